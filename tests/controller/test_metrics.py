"""What /metrics exports is what docs/operating.md lists and what the Grafana dashboard asks for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_calls import get, post
from local_workers import StartCluster
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.requests import ExpertBalance, FinishReason, SequenceOutput, StepOutput
from pilotfish.controller.metrics import Metrics, _TokenTimes
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs"
UNITS = ("_seconds", "_tokens", "_sequences", "_blocks", "_ratio", "_requests", "_replicas", "_restarts", "_recoveries")
UNITS += ("_preemptions", "_moves", "_decisions")  # counts of what the name says


@pytest.fixture
async def families(start_cluster: StartCluster) -> list[Metric]:
    """Of a running controller that has served and refused requests."""
    cluster = await start_cluster(expert_balance=ExpertBalance(measured=1.5, expected=1.25, num_moves=9, last_step_id=8))
    await post(cluster, "/v1/completions", {"model": "tiny", "prompt": list(range(40)), "max_tokens": 6})
    await post(cluster, "/v1/completions", {"prompt": ""})
    _, _, text = await get(cluster, "/metrics")
    return list(text_string_to_metric_families(text.decode()))


def samples(families: list[Metric]) -> dict[str, set[str]]:
    """Label names by sample name."""
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions(node: Any) -> list[str]:
    """Every query in a dashboard, those of its variables too."""
    if isinstance(node, dict):
        own = [value for name, value in node.items() if name in ("expr", "definition")]
        return own + [expression for value in node.values() for expression in expressions(value)]
    return [expression for value in node for expression in expressions(value)] if isinstance(node, list) else []


async def test_the_dashboard_asks_only_for_what_is_exported(families: list[Metric]) -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    exported = samples(families)
    queries = expressions(board)
    assert len(queries) > 30
    asked = set()
    for query in queries:
        names = re.findall(r"\bpilotfish_\w+", query)
        assert names, query
        asked |= set(names)
        assert not set(names) - set(exported), query
        labels = {label for block in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!]", block)}
        labels |= {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
        labels |= set(re.findall(r"label_values\(\w+, (\w+)\)", query))
        known = set.union(*(exported[name] for name in names))
        assert labels <= known, f"{query}: {labels - known} are no labels of {names}"
    families_asked = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked}
    wanted = {name for name in exported if not re.search(r"_(bucket|count|sum|created)$", name)}
    assert wanted - families_asked <= {"pilotfish_uptime_seconds", "pilotfish_expert_moves_total"}, "not on any panel"


def test_the_dashboard_has_the_form_that_grafana_loads() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    assert board["schemaVersion"] >= 39
    assert board["title"]
    assert board["uid"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    variables = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__all"}
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["expr"].count("(") == target["expr"].count(")")


async def test_the_table_of_metrics_is_true(families: list[Metric]) -> None:
    rows = re.findall(r"^\| `(pilotfish_\w+)` \| (\w+) \|([^|]*)\|", (DOCS / "operating.md").read_text(), flags=re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    exported = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.endswith("_created"):
            exported[name] = (family.type, labels)
            assert family.documentation
            assert re.sub(r"_total$", "", name).endswith(UNITS), f"{name} does not say what it counts"
    assert documented == exported


def step(step_id: int, *outputs: tuple[str, int, bool]) -> StepOutput:
    return StepOutput(
        step_id=step_id,
        sequences=tuple(
            SequenceOutput(
                request_id=name, offset=0, token_ids=(1,) * num_tokens, finish_reason=FinishReason.LENGTH if ends else None
            )
            for name, num_tokens, ends in outputs
        ),
    )


def test_gaps_between_tokens_are_a_sequences_own() -> None:
    times = _TokenTimes()
    assert times.gaps_s("r", step(1, ("a", 1, False)), now=1.0) == []
    assert times.gaps_s("r", step(2, ("a", 1, False), ("b", 1, False)), now=1.5) == [(0.5, 1)]
    assert times.gaps_s("s", step(1, ("a", 1, False)), now=9.0) == [], "another replica's"
    assert times.gaps_s("r", step(3, ("a", 2, True)), now=2.5) == [(0.5, 2)]
    assert times.gaps_s("r", step(4, ("b", 1, False), ("a", 1, False)), now=3.5) == [(2.0, 1)], "an id that ended is a new one"
    assert times.gaps_s("r", step(1, ("b", 1, False)), now=9.0) == [], "a new worker's step"


async def test_what_is_lost_has_no_load(start_cluster: StartCluster) -> None:
    state = (await start_cluster()).service.status()
    lost = replace(state, replicas=tuple(replace(replica, state=ReplicaState.LOST) for replica in state.replicas))
    metrics = Metrics()
    assert b"pilotfish_kv_blocks{" in metrics.render(state)[0]
    text = metrics.render(lost)[0]
    assert b'pilotfish_replicas{state="lost"} 1.0' in text
    assert b"pilotfish_kv_blocks{" not in text
