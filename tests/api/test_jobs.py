"""Reading, listing and canceling jobs."""

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.plan import Form, LayerFacts, RankRow, ReasonCode
from service.store.attempts import finish_failed
from service.store.events import append_events
from service.store.layers import insert_layers
from service.store.ranks import insert_rank_rows
from tests.api.conftest import SPEC, Api, assert_problem


def test_pages_hold_every_job_once_newest_first(api: Api) -> None:
    made = [api.job_id() for _ in range(7)]
    seen, cursor, pages = [], None, 0
    while pages < 10:
        page = api.client.get("/v1/jobs", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["items"]]
        cursor, pages = page["next_cursor"], pages + 1
        if cursor is None:
            break
    assert seen == sorted(made, reverse=True)
    assert pages == 3


def test_page_size_is_bounded(api: Api) -> None:
    assert api.client.get("/v1/jobs?limit=1000000").status_code == 200


def test_filters(api: Api) -> None:
    waiting, running = None, api.job_id()
    api.claim()
    answer = api.submit({**SPEC, "seed": 1})
    waiting = answer.json()["id"]

    def ids(query: str) -> list[str]:
        return [job["id"] for job in api.client.get(f"/v1/jobs?{query}").json()["items"]]

    assert ids("state=queued") == [waiting]
    assert ids("state=running") == [running]
    assert ids("state=running&state=queued") == [waiting, running]
    assert ids("state=failed") == []
    assert ids(f"model_id={answer.json()['model_id']}") == [waiting, running]
    assert ids("model_id=mdl_x") == []
    assert ids("model_id=%00") == []
    assert ids("name=nobody") == []


def test_cancel_of_a_waiting_job_is_at_once_and_repeatable(api: Api) -> None:
    job_id = api.job_id()
    for _ in range(3):
        answer = api.client.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 202
        assert answer.json()["state"] == "canceled"
    states = [line["data"] for line in api.client.get(f"/v1/jobs/{job_id}/events").json()["items"]]
    assert states == [{"state": "queued"}, {"state": "canceled"}]


def test_attempts_are_listed_with_their_ends(api: Api) -> None:
    job_id = api.job_id()
    assert api.client.get(f"/v1/jobs/{job_id}/attempts").json() == {"items": []}
    claimed = api.claim()
    [running] = api.client.get(f"/v1/jobs/{job_id}/attempts").json()["items"]
    assert (running["epoch"], running["outcome"], running["ended_at"]) == (1, None, None)
    with api.services.database.write() as session:
        finish_failed(session, job_id, claimed.epoch, ProblemError(ErrorCode.DIVERGED, "the loss rose").problem())
    [ended] = api.client.get(f"/v1/jobs/{job_id}/attempts").json()["items"]
    assert (ended["outcome"], ended["detail"]) == ("failed", "the loss rose")
    assert ended["ended_at"] >= ended["started_at"]


def test_cancel_of_a_running_job_is_a_flag(api: Api) -> None:
    job_id = api.job_id()
    api.claim()
    for _ in range(2):
        job = api.client.post(f"/jobs/{job_id}/cancel").json()
        assert (job["state"], job["cancel_requested"]) == ("running", True)


def test_cancel_of_a_finished_job_is_a_conflict(api: Api) -> None:
    job_id = api.job_id()
    claimed = api.claim()
    problem = ProblemError(ErrorCode.MODEL_RAISED, "the model raised ValueError: no").problem()
    with api.services.database.write() as session:
        assert finish_failed(session, job_id, claimed.epoch, problem)
    assert_problem(api.client.post(f"/v1/jobs/{job_id}/cancel"), 409, "STATE_CONFLICT")
    job = api.client.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert job["problem"]["code"] == "MODEL_RAISED"
    assert job["problem"]["detail"] == "the model raised ValueError: no"


def test_events_after_a_number(api: Api) -> None:
    job_id = api.job_id()
    with api.services.database.write() as session:
        append_events(session, job_id, None, [(EventKind.STEP, {"step": step}) for step in range(5)])
    first = api.client.get(f"/v1/jobs/{job_id}/events?limit=4").json()
    assert [line["id"] for line in first["items"]] == [1, 2, 3, 4]
    rest = api.client.get(f"/v1/jobs/{job_id}/events?after={first['next_after']}").json()
    assert [line["data"] for line in rest["items"]] == [{"step": 3}, {"step": 4}]
    end = api.client.get(f"/v1/jobs/{job_id}/events?after={rest['next_after']}").json()
    assert end == {"items": [], "next_after": rest["next_after"]}


def test_layers_and_their_history(api: Api) -> None:
    job_id = api.job_id()
    claimed = api.claim()
    facts = LayerFacts(
        position=0, name="fc", kind="linear", weight="fc.weight", weight_shape=[8, 4], params=32, macs=32
    )
    with api.services.database.write() as session:
        assert insert_layers(session, job_id, claimed.epoch, [facts])
        for step, chosen in ((0, False), (1, True)):
            row = RankRow(
                step=step, layer="fc", term=0, form=Form.MATRIX, rank=2 - step, params=12, macs=12, chosen=chosen,
                reason=ReasonCode.RANK_SELECTED,
            )  # fmt: skip
            assert insert_rank_rows(session, job_id, claimed.epoch, [row])
    page = api.client.get(f"/v1/jobs/{job_id}/layers").json()
    (layer,) = page["items"]
    assert (layer["name"], layer["form"], layer["terms"][0]["rank"], page["history"]) == ("fc", "matrix", 1, None)
    history = api.client.get(f"/v1/jobs/{job_id}/layers?history=true").json()["history"]
    assert [(row["step"], row["rank"]) for row in history] == [(0, 2), (1, 1)]


def test_no_report_yet(api: Api) -> None:
    problem = assert_problem(api.client.get(f"/v1/jobs/{api.job_id()}/report"), 404, "NOT_FOUND")
    assert "queued" in problem["detail"]
