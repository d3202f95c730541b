"""A child never imports PyTorch's compiler, and what it does without it is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_jobs import ConvNet, quick, save_data, save_model
from torch import nn

from worker.engine.uncompiled import PlainSGD

STAGES = """
import json, os, sys
from worker.channel import Assignment, MessageWriter
from worker.runner import run_stage

given = json.loads(sys.argv[1])
with open(os.devnull, "wb") as nobody:
    for stage in ("learn", "emit", "verify"):
        run_stage(Assignment(stage=stage, job_id="j", epoch=1, hashes={}, **given), MessageWriter(nobody))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_no_stage_imports_the_compiler(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", ConvNet())
    data = save_data(tmp_path / "data.npz", model, (2, 8, 8), count=96)
    given = {
        "model_path": str(model),
        "data_path": str(data),
        "data_format": "npz",
        "spec": quick(budget={"max_params_fraction": 0.5}, training={"optimizer": {"weight_decay": 1e-3}}),
        "work_dir": str(tmp_path),
    }
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = [sys.executable, "-W", "ignore", "-c", STAGES, json.dumps(given)]
    made = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_plain_update_is_that_of_pytorch(nesterov: bool) -> None:
    nets = []
    for optimizer in (PlainSGD, torch.optim.SGD):
        torch.manual_seed(0)
        net = nn.Linear(6, 3)
        made = optimizer(net.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=1e-2)
        for _ in range(4):
            made.zero_grad()
            net(torch.ones(2, 6)).square().sum().backward()
            made.step()
        nets.append(net)
    assert all(torch.equal(one, other) for one, other in zip(*(net.parameters() for net in nets), strict=True))
