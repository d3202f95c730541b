import pytest

from service.contract.plan import Form, LayerFacts, RankRow, ReasonCode
from service.contract.states import AttemptOutcome
from service.store.attempts import requeue
from service.store.layers import insert_layers, layer_plan
from service.store.ranks import insert_rank_rows, rank_history

LAYERS = [
    LayerFacts(position=0, name="conv", kind="conv2d", weight_shape=[8, 3, 3, 3], calls=1, params=224, macs=1000),
    LayerFacts(position=1, name="fc", kind="linear", weight_shape=[10, 8], calls=1, params=90, macs=80),
    LayerFacts(position=2, name="emb", kind="embedding", calls=1, params=50, macs=None),
]


def row(step, layer, term, form, rank, params, macs, **values):
    return RankRow(step=step, layer=layer, term=term, form=form, rank=rank, params=params, macs=macs, **values)


@pytest.fixture
def running(database, submit, take):
    submit()
    claimed = take()
    with database.write() as session:
        assert insert_layers(session, claimed.job_id, claimed.epoch, LAYERS)
    return claimed


def write(database, claimed, rows):
    with database.write() as session:
        assert insert_rank_rows(session, claimed.job_id, claimed.epoch, rows)


def plan(database, job_id):
    with database.read() as session:
        return layer_plan(session, job_id)


def test_before_any_step_every_layer_is_dense(database, running):
    found = plan(database, running.job_id)
    assert [(layer.name, layer.form, layer.compressed_params) for layer in found] == [
        ("conv", "dense", 224), ("fc", "dense", 90), ("emb", "dense", 50),
    ]  # fmt: skip
    assert found[0].weight_shape == [8, 3, 3, 3]


def test_the_plan_is_read_from_the_rows(database, running):
    write(database, running, [
        row(0, "conv", 0, Form.CHANNEL, 2, 100, 400, relative_error=0.5),
        row(0, "fc", 0, Form.DENSE, None, 90, 80, reason=ReasonCode.DENSE_PREFERRED),
        row(3, "conv", 0, Form.CHANNEL, 1, 60, 300, relative_error=0.25),
        row(3, "conv", 1, Form.SPATIAL, 2, 30, 100, relative_error=0.25),
        row(0, "emb", 0, Form.DENSE, None, 50, 0, reason=ReasonCode.UNSUPPORTED_KIND),
    ])  # fmt: skip
    conv, fc, emb = plan(database, running.job_id)
    assert (conv.form, conv.compressed_params, conv.compressed_macs, conv.step) == ("sum", 90, 400, 3)
    assert conv.relative_error == 0.25
    assert [(term.form, term.rank) for term in conv.terms] == [("channel", 1), ("spatial", 2)]
    assert (fc.form, fc.reason, fc.compressed_params) == ("dense", "DENSE_PREFERRED", 90)
    assert "worth its cost" in fc.message
    assert (emb.reason, emb.compressed_macs) == ("UNSUPPORTED_KIND", None)


def test_a_term_says_its_size_in_its_own_unit(database, running):
    quantized = {"type": "quantize", "details": {"values": 4}, "bits": 300}
    pruned = {"type": "prune", "details": {"kept": 8, "kept_fraction": 8 / 216, "index": "bitmap"}, "bits": 120}
    write(database, running, [
        row(0, "conv", 0, Form.QUANTIZED, 4, 216, 0, **quantized),
        row(0, "conv", 1, Form.PRUNED, 8, 8, 1000, **pruned),
        row(0, "fc", 0, Form.MATRIX, 3, 64, 54, bits=2048),
        row(0, "emb", 0, Form.TUCKER2, 3, 40, 0, type="tucker2", details={"rank_out": 5}),
    ])  # fmt: skip
    conv, fc, emb = plan(database, running.job_id)
    assert (conv.form, conv.compressed_bits, conv.compressed_macs) == ("sum", 420, 1000)
    assert [(term.type, term.summary, term.macs_stay) for term in conv.terms] == [
        ("quantize", "4 values", True), ("prune", "kept 3.7 %", True),
    ]  # fmt: skip
    assert conv.terms[1].details == pruned["details"]
    assert [(term.summary, term.macs_stay) for term in fc.terms] == [("rank 3", False)]
    assert (fc.compressed_bits, emb.compressed_bits) == (2048, None)
    assert emb.terms[0].summary == "ranks 5×3"


def test_a_dropped_term_is_shown_with_its_reason(database, running):
    write(database, running, [
        row(0, "conv", 0, Form.CHANNEL, 2, 100, 400, reason=ReasonCode.RANK_SELECTED),
        row(0, "conv", 1, Form.SPATIAL, 0, 0, 0, reason=ReasonCode.RANK_ZERO),
    ])  # fmt: skip
    conv = plan(database, running.job_id)[0]
    assert (conv.form, conv.reason, conv.compressed_params) == ("channel", "RANK_SELECTED", 100)
    assert [term.reason for term in conv.terms] == ["RANK_SELECTED", "RANK_ZERO"]


def test_chosen_rows_hold_over_later_steps(database, running):
    write(database, running, [row(2, "fc", 0, Form.MATRIX, 3, 64, 54, chosen=True)])
    write(database, running, [row(5, "fc", 0, Form.MATRIX, 1, 28, 18)])
    assert plan(database, running.job_id)[1].terms[0].rank == 3


def test_a_resumed_attempt_replaces_what_it_repeats(database, running, take):
    write(database, running, [row(s, "fc", t, Form.MATRIX, 4, 80, 70) for s in (1, 2, 3) for t in (0, 1)])
    with database.write() as session:
        requeue(session, running.job_id, running.epoch, outcome=AttemptOutcome.LOST, delay_seconds=0, counted=True)
    second = take()
    write(database, second, [row(2, "fc", 0, Form.MATRIX, 2, 46, 36)])
    with database.read() as session:
        history = [(r.step, r.term, r.rank) for r in rank_history(session, running.job_id)]
    assert history == [(1, 0, 4), (1, 1, 4), (2, 0, 2), (3, 0, 4), (3, 1, 4)]
    write(database, second, [row(2, "fc", 0, Form.MATRIX, 2, 46, 36, chosen=True)])
    with database.read() as session:
        history = [(r.step, r.term, r.rank, r.chosen) for r in rank_history(session, running.job_id)]
    assert history == [(1, 0, 4, False), (1, 1, 4, False), (2, 0, 2, True)]


def test_the_same_row_twice_is_one(database, running):
    for rank in (4, 3):
        write(database, running, [row(1, "fc", 0, Form.MATRIX, rank, 80, 70)])
    with database.write() as session:
        assert insert_layers(session, running.job_id, running.epoch, LAYERS)
    with database.read() as session:
        assert [r.rank for r in rank_history(session, running.job_id)] == [3]
    assert len(plan(database, running.job_id)) == 3


def test_many_rows_fit_in_one_call(database, running):
    write(database, running, [row(step, "fc", 0, Form.MATRIX, 1, 1, 1) for step in range(1700)])
    with database.read() as session:
        assert len(rank_history(session, running.job_id)) == 1700
