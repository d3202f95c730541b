"""Two machines with nothing but three URLs in common: a job killed on one resumes on the other, bit for bit."""

import shutil

import pytest
from fleet import SCALED

OFTEN = {"CHECKPOINT_SECONDS": "0.05", "CHECKPOINT_SPACING_SECONDS": "0"}

# Over a shared directory another machine takes over in test_stopped.py and test_database_cut.py, too.
FILES = [pytest.param("shared directory", marks=pytest.mark.full), "s3"]


@pytest.mark.parametrize("files", FILES)
def test_a_job_killed_on_one_machine_resumes_on_the_other(make_fleet, real_job, undisturbed_artifact, files, request):
    if files == "s3":
        blob_url = request.getfixturevalue("s3_url")
        fleet = make_fleet(
            SCALED | OFTEN, blob_url=blob_url, environment=request.getfixturevalue("s3_server").environment
        )
    else:
        fleet = make_fleet(SCALED | OFTEN)
    fleet.add_service()
    fleet.keeps = False
    first = fleet.add_machine(MARK="mid_l_step=kill_both@120")
    job_id = fleet.submit(real_job)
    fleet.wait(lambda: not first.alive(), 60, "the first machine is killed in the middle of the job")
    fleet.remove(first)
    shutil.rmtree(first.folder)  # it does not come back
    fleet.wait_for_checkpoint(job_id)
    resumed_from = max(row.position for row in fleet.checkpoints(job_id))
    second = fleet.add_machine()
    fleet.wait_for_epoch(job_id, 2)
    assert fleet.machine_of(job_id) is second
    fleet.wait_for_end([job_id], 120)
    fleet.check([job_id])
    starts = [note for note in fleet.notes(job_id) if note["what"] == "start" and note["stage"] == "learn"]
    assert [note["resumes"] for note in starts] == [False, True]
    assert fleet.artifact(job_id) == undisturbed_artifact
    print(f"resumed from update {resumed_from} on the other machine, over {files}")
