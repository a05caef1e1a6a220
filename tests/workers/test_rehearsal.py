"""Kernels are at hand before the first step: what is rehearsed is what runs."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from pilotfish.common.config import EngineConfig
from pilotfish.models.build import load_model
from pilotfish.workers.rehearsal import KERNELS, _with_each_kind_of_layer, stamp_path

# In a process of its own, with empty caches the first time: fails where a kernel is compiled elsewhere than on compile_ahead's
# threads, and the second time where one is compiled at all.
START = """
import os, threading
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.scheduler.step_plan import AdmittedSequence, PlannedRow, StepPlan
from pilotfish.kernels.cuda import loader
from pilotfish.workers.model_runner import ModelRunner
from pilotfish.workers.runner_setup import set_up_runner
from triton import knobs

compiled = []
def note(kernel):
    compiled.append((kernel, threading.current_thread().name))
knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or note(src.fn.__name__)
build = loader.build
loader.build = lambda source, *rest: note(source) or build(source, *rest)

rehearsed = []
rehearse = ModelRunner.rehearse
ModelRunner.rehearse = lambda *arguments: rehearsed.append(1) or rehearse(*arguments)
model = ModelConfig(model="dummy:qwen3-0.6b", max_model_len=256)
runner, info = set_up_runner(model, EngineConfig(max_num_seqs=8, num_kv_blocks=128))
sampling = TokenSampling(temperature=0.0, max_tokens=3, seed=0)
request = EngineRequest(request_id="r", prompt_token_ids=(5,) * 70, sampling=sampling)
sequence = AdmittedSequence(request, 0, request.prompt_token_ids, (), 0, 0)
pages = (1, 2, 3, 4, 5)
runner.run(StepPlan(0, (sequence,), (PlannedRow("r", 0, 0, 70, True, pages, 0),), ()))
runner.run(StepPlan(1, (), (PlannedRow("r", 0, 70, 1, True, (), 1),), ()))
# 1036 and then 1205 tokens beside one that goes on: no graph holds steps of so many, nor any of few rows.
for step_id, first_slot, length, num_rows in ((2, 1, 207, 5), (3, 1, 241, 5)):
    admitted, rows = [], [PlannedRow("r", 0, 69 + step_id, 1, True, (), step_id)]
    for slot in range(first_slot, first_slot + num_rows):
        name, tokens = f"r{step_id}.{slot}", tuple(range(length))
        other = EngineRequest(request_id=name, prompt_token_ids=tokens, sampling=sampling)
        admitted.append(AdmittedSequence(other, slot, tokens, (), 0, 0))
        blocks = tuple(range(6 + 16 * slot, 6 + 16 * slot + -(-length // 16)))
        rows.append(PlannedRow(name, slot, 0, length, True, blocks, 0))
    runner.run(StepPlan(step_id, tuple(admitted), tuple(rows), () if step_id == 2 else tuple(range(1, 6))))
if os.environ["FIRST"]:
    assert len(compiled) > 20, compiled
else:  # the stamp says that there is nothing to rehearse
    assert not rehearsed and not compiled, compiled
assert list(info.kernels) == ["cuda"], info.kernels
late = [kernel for kernel in compiled if not kernel[1].startswith("compile")]
assert not late, late
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_start_with_empty_caches_compiles_nothing_one_by_one(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PILOTFISH_CACHE": str(tmp_path)}
    for is_first in (True, False):
        environment["FIRST"] = "1" if is_first else ""
        done = subprocess.run(
            [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_stamp_stands_for_all_that_decides_about_kernels(tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    model, config = load_model(tiny_llama, device="cpu"), EngineConfig(max_num_seqs=8)
    facts = {"model": model, "config": config, "num_tokens": 64, "max_model_len": 128, "gpu_name": "H200"}
    stamp = stamp_path(**facts)
    assert stamp == stamp_path(**facts)
    assert stamp.parent.is_relative_to(tmp_path)
    edited = tmp_path / "kernels"
    shutil.copytree(KERNELS, edited, ignore=shutil.ignore_patterns("__pycache__"))
    (edited / "cuda" / "device.cuh").open("a").write("// other")
    changes = ({"config": EngineConfig(max_num_seqs=9)}, {"num_tokens": 65}, {"max_model_len": 129}, {"gpu_name": "H100"})
    others = [stamp_path(**facts | change) for change in changes]
    monkeypatch.setattr("pilotfish.workers.rehearsal.KERNELS", edited)
    others.append(stamp_path(**facts))
    assert len({stamp, *others}) == 6


def test_rehearsing_changes_nothing_of_what_follows(run_requests, make_request):
    requests = [make_request(f"r{i}", [i + 1] * length, max_tokens=5) for i, length in enumerate((1, 20, 40))]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    sizes: list[int] = []

    def rehearse(runner) -> None:
        forward: Callable = runner.model.forward
        runner.model.forward = lambda batch: sizes.append(len(batch.token_ids_T)) or forward(batch)
        runner.rehearse([1, 2, 4], [16, 64, 1 << 20])
        runner.model.forward = forward

    result = run_requests(*requests, **options, prepare=rehearse)
    assert sizes == [16, 64, 1, 2, 4]  # no step has more tokens than all sequences together
    assert result.tokens == run_requests(*requests, **options).tokens


def test_layers_that_are_alike_are_rehearsed_once(tiny_llama):
    model = load_model(tiny_llama, device="cpu")
    first, second = model.decoder_layers
    windowed = copy.deepcopy(second)
    windowed.attention.window = 16
    model.decoder_layers = [first, second, second, windowed, first, windowed]
    assert _with_each_kind_of_layer(model).decoder_layers == [first, second, windowed]
    assert len(model.decoder_layers) == 6
