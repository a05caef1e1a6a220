"""Proves a checkpoint: its weights load strictly, and its logits and greedy tokens are those of transformers in float32.

Random prompts of mixed lengths run in one batch through the paged cache: prefill, then decode steps, then once more with the
prefill in chunks that mix with decode rows. The reference runs each prompt alone through untouched transformers. The same again
over several ranks, each a process on this machine's CPU that reads its own slices.

V vocabulary, P prompt and decoded tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..common.config import ParallelConfig
from ..common.errors import ModelLoadError
from .build import load_model
from .causal_lm import CausalLM
from .local_ranks import RanksFailedError, run_ranks
from .paged_sequences import PagedSequences
from .parallel import Parallel

if TYPE_CHECKING:
    import transformers

# Largest |logit - reference|, relative to the largest reference logit (or to 1 where that is less).
TOLERANCE = 1e-4
NUM_DECODE_STEPS = 16
_CHUNK_TOKENS = 7
_DECODE_STEPS_AFTER_CHUNKS = 4
# One rank's rows as JSON carries them.
RankRows = list[tuple[str, bool, str]]


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One line of the proof."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Reference:
    """One prompt through transformers: logits of every position, and the greedy tokens that followed the prompt."""

    prompt: list[int]
    tokens: list[int]
    logits_PV: torch.Tensor


def check_model(
    path: str | Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    expert_parallel: bool = False,
) -> list[CheckRow]:
    """The proof of the checkpoint directory, a row a claim; what fails to load ends it early with a row that is not ok.

    Needs memory for the model twice, once of them in float32, and once more over ranks, each data rank with what its own
    attention and dense layers need. The last three are as of ParallelConfig.

    Raises:
        ConfigError: they do not go together.
    """
    ranks = ParallelConfig(tensor_parallel=tensor_parallel, data_parallel=data_parallel, expert_parallel=expert_parallel)
    import transformers  # not above: seconds, and ranks import this module too

    try:
        model = load_model(path, device=device, dtype="float32")
    except ModelLoadError as error:
        return [CheckRow("weights", False, error.message)]
    rows = [CheckRow("weights", True, f"{model.config.architecture}, {model.num_parameters / 1e6:.1f} M parameters")]
    try:
        untouched = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        return [*rows, CheckRow("reference", False, f"transformers {transformers.__version__} cannot load it: {error}")]
    # Data ranks have prompts of their own, of the same lengths.
    references = [
        [run_reference(untouched.eval(), prompt) for prompt in choose_prompts(model, seed=seed + rank)]
        for rank in range(data_parallel)
    ]
    rows += compare(model, references[0])
    return rows if ranks.num_ranks == 1 else rows + compare_ranks(path, references, ranks)


def choose_prompts(model: CausalLM, *, seed: int) -> list[list[int]]:
    """Random prompts of mixed lengths; where a layer has a sliding window, one prompt is longer than it (up to 1024)."""
    longest = model.config.max_position - NUM_DECODE_STEPS
    windows = [window for window in model.config.windows if window is not None]
    lengths = [1, 5, 17, 40] + [min(max(windows) + 9, 1024) for _ in windows[:1]]
    generator = random.Random(seed)
    return [
        [generator.randrange(model.config.vocab_size) for _ in range(min(length, longest))] for length in lengths if longest > 0
    ]


@torch.inference_mode()
def run_reference(untouched: transformers.PreTrainedModel, prompt: Sequence[int]) -> Reference:
    """Prefill and greedy decode steps, with transformers' own cache."""
    output = untouched(torch.tensor([prompt]), use_cache=True)
    logits, tokens = [output.logits[0]], []
    for _ in range(NUM_DECODE_STEPS):
        tokens.append(int(logits[-1][-1].argmax()))
        output = untouched(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return Reference(list(prompt), tokens, torch.cat(logits))


def compare(model: CausalLM, references: Sequence[Reference]) -> list[CheckRow]:
    """Runs the references' tokens through the model. Each step gets the reference's token, so that errors do not compound."""
    max_len = max(len(reference.logits_PV) for reference in references)
    paged = PagedSequences(model, num_sequences=len(references), max_len=max_len)
    prefill = paged.extend({i: reference.prompt for i, reference in enumerate(references)})
    steps = [
        paged.extend({i: [reference.tokens[step]] for i, reference in enumerate(references)})
        for step in range(NUM_DECODE_STEPS)
    ]
    decode = {i: torch.cat([step[i] for step in steps]) for i in range(len(references))}
    chunked = _run_in_chunks(model, references, max_len)
    return [
        _logits_row("prefill logits", [(prefill[i], r.logits_PV[: len(r.prompt)]) for i, r in enumerate(references)]),
        _logits_row("decode logits", [(decode[i], r.logits_PV[len(r.prompt) :]) for i, r in enumerate(references)]),
        _tokens_row([torch.cat([prefill[i][-1:], decode[i][:-1]]) for i in range(len(references))], references),
        _logits_row("chunked prefill", [(chunked[i], r.logits_PV[: len(chunked[i])]) for i, r in enumerate(references)]),
    ]


def compare_ranks(path: str | Path, references: Sequence[Sequence[Reference]], ranks: ParallelConfig) -> list[CheckRow]:
    """The rows of `compare` over ranks of this machine's CPU; a row is ok when every rank says so.

    `references` of each data rank.
    """
    name = f"{ranks.num_ranks} ranks"
    with tempfile.TemporaryDirectory(prefix="pilotfish-check-") as directory:
        files = [str(Path(directory) / f"references-{number}.pt") for number in range(len(references))]
        for file, of_rank in zip(files, references, strict=True):
            save_references(of_rank, Path(file))
        try:
            rows: list[RankRows] = run_ranks(
                ranks.tensor_parallel,
                _compare_own,
                str(path),
                files,
                data_size=ranks.data_parallel,
                whole_experts=ranks.expert_parallel,
            )
        except RanksFailedError as error:
            return [CheckRow(name, False, str(error))]
    return [_merge(name, claim) for claim in zip(*rows, strict=False)]  # what cannot be loaded has one row only


def save_references(references: Sequence[Reference], file: Path) -> None:
    """For compare_on_rank."""
    torch.save([asdict(reference) for reference in references], file)


def _compare_own(parallel: Parallel, path: str, references_files: Sequence[str]) -> RankRows:
    return compare_on_rank(parallel, path, references_files[0 if parallel.data is None else parallel.data.rank])


def compare_on_rank(parallel: Parallel, path: str, references_file: str) -> RankRows:
    """One rank's part of compare_ranks."""
    try:
        model = load_model(path, device="cpu", dtype="float32", parallel=parallel)
    except ModelLoadError as error:
        return [("weights", False, error.message)]
    references = [Reference(**fields) for fields in torch.load(references_file, mmap=True, weights_only=True)]
    rows = [CheckRow("weights", True, f"{model.num_parameters / 1e6:.1f} M parameters"), *compare(model, references)]
    return [(row.name, row.ok, row.detail) for row in rows]


def _merge(name: str, ranks: Sequence[tuple[str, bool, str]]) -> CheckRow:
    """Every rank's row of one claim: what the first has against it, else what all say."""
    wrong = [f"rank {rank}: {detail}" for rank, (_, ok, detail) in enumerate(ranks) if not ok]
    details = [detail for _, _, detail in ranks]
    detail = " + ".join(details) if len(set(details)) > 1 else details[0]
    return CheckRow(f"{name}: {ranks[0][0]}", not wrong, wrong[0] if wrong else detail)


def _run_in_chunks(model: CausalLM, references: Sequence[Reference], max_len: int) -> list[torch.Tensor]:
    """The first positions' logits, a few tokens a pass: a short prompt decodes while a long one is still in its prefill, and
    the longest decodes a few tokens."""
    paged = PagedSequences(model, num_sequences=len(references), max_len=max_len, seed=1)
    pieces: list[list[torch.Tensor]] = [[] for _ in references]
    waiting = {}
    for i, reference in enumerate(references):
        prompt = reference.prompt
        chunks = [prompt[start : start + _CHUNK_TOKENS] for start in range(0, len(prompt), _CHUNK_TOKENS)]
        waiting[i] = chunks + [[token] for token in reference.tokens]
    num_passes = max(map(len, waiting.values())) - NUM_DECODE_STEPS + _DECODE_STEPS_AFTER_CHUNKS
    for _ in range(num_passes):
        for i, logits in paged.extend({i: chunks.pop(0) for i, chunks in waiting.items()}).items():
            pieces[i].append(logits)
        waiting = {i: chunks for i, chunks in waiting.items() if chunks}
    return [torch.cat(logits) for logits in pieces]


def _logits_row(name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> CheckRow:
    worst = max(_error(got, want) for got, want in pairs)
    scale = max(1.0, *(float(want.abs().max()) for _, want in pairs))
    num_positions = sum(len(want) for _, want in pairs)
    return CheckRow(
        name, worst <= TOLERANCE * scale, f"largest error {worst:.1e} at {num_positions} positions, logits up to {scale:.1f}"
    )


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number, which no comparison would notice."""
    difference = (got - want).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


def _tokens_row(logits: Sequence[torch.Tensor], references: Sequence[Reference]) -> CheckRow:
    for i, reference in enumerate(references):
        tokens = logits[i].argmax(-1).tolist()
        for step, (got, want) in enumerate(zip(tokens, reference.tokens, strict=True)):
            if got != want:
                return CheckRow(
                    "greedy tokens", False, f"prompt {i} ({len(reference.prompt)} tokens), step {step}: {got}, not {want}"
                )
    return CheckRow("greedy tokens", True, f"{len(references)} prompts x {NUM_DECODE_STEPS} tokens equal")
