"""`python -I score.py MODEL DATA`: the test accuracy of a TorchScript file, with nothing but torch and numpy."""

import json
import sys

import numpy as np
import torch

network = torch.jit.load(sys.argv[1]).eval()
with np.load(sys.argv[2]) as data, torch.no_grad():
    scores = network(torch.from_numpy(data["test_inputs"]))
    accuracy = float((scores.argmax(1).numpy() == data["test_targets"]).mean())
print(json.dumps({"accuracy": accuracy, "parameters": sum(weight.numel() for weight in network.parameters())}))
