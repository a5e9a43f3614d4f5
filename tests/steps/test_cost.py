"""What a student cost, in words and in sums."""

from __future__ import annotations

import torch

from danceopd.devices import hardware
from danceopd.steps.cost import Spent, cost_table

CPU, GPUS = {"device": "cpu", "count": 2}, {"device": "NVIDIA H100", "count": 8}


def test_steps_are_told_with_their_hardware_and_summed_apart():
    steps = [
        Spent("teacher a", 1800, CPU, 900),
        Spent("teacher b", 3600, GPUS, 100),
        Spent("evaluation", 900, GPUS, 24),
    ]
    assert cost_table(steps) == {
        "teacher a": "1,800 s on 2 CPU cores, 900 forwards",
        "teacher b": "3,600 s on 8 x NVIDIA H100, 100 forwards",
        "evaluation": "900 s on 8 x NVIDIA H100, 24 forwards",
        "GPU hours": "10",
        "CPU core hours": "1",
        "forwards": "1,024",
    }


def test_hours_of_hardware_that_is_not_there_are_not_named():
    table = cost_table([Spent("distillation", 36, CPU)])
    assert table == {"distillation": "36 s on 2 CPU cores", "CPU core hours": "0.02", "forwards": "0"}


def test_a_product_without_its_hardware_counts_no_hours():
    assert cost_table([Spent("old", 9, None, 5)]) == {"old": "9 s, 5 forwards", "forwards": "5"}


def test_a_cpu_counts_its_cores_over_all_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert hardware(torch.device("cpu"), 2) == {"device": "cpu", "count": 6}
    assert Spent("x", 1, hardware(torch.device("cpu"))).told() == "1 s on 3 CPU cores"
