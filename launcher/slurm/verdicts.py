"""Results of the check of the nodes: each node's report, and which nodes are bad."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.disk.run_folder import write_whole


@dataclass(frozen=True)
class NodeReport:
    """The report of one node.

    Attributes:
        node: Its name.
        problems: What is wrong with the node alone.
        time: When it was written, by the node's clock.
        together: The node's clock when the sum over all nodes was done; None if it failed.
        error: Why the sum failed.
    """

    node: str
    problems: tuple[str, ...]
    time: float
    together: float | None = None
    error: str | None = None


def write_report(folder: Path, report: NodeReport) -> None:
    """Writes a node's report."""
    write_whole(folder / f"{report.node}.json", json.dumps(asdict(report)))


def read_reports(folder: Path, nodes: Sequence[str]) -> dict[str, NodeReport]:
    """The reports of those nodes that have written one."""
    found = {}
    for node in nodes:
        file = folder / f"{node}.json"
        if file.is_file():
            fields = json.loads(file.read_bytes())
            found[node] = NodeReport(**{**fields, "problems": tuple(fields["problems"])})
    return found


def bad_nodes(reports: Mapping[str, NodeReport], nodes: Sequence[str], clock_seconds: float) -> dict[str, str]:
    """Nodes that should not be used, and why.

    A node with a problem of its own makes the sum of all nodes fail, so the sum counts only if there is no such node.
    Where the sum failed everywhere, no node is known to be bad.

    Args:
        reports: By node.
        nodes: All of the job.
        clock_seconds: Largest difference of two clocks.
    """
    bad = {node: "; ".join(report.problems) for node, report in reports.items() if report.problems}
    if bad:
        return bad
    bad = {node: "gave no answer" for node in nodes if node not in reports}
    if bad:
        return bad
    failed = {node: report.error for node, report in reports.items() if report.error is not None}
    if failed:
        return {node: f"sum over all nodes: {why}" for node, why in failed.items()} if len(failed) < len(nodes) else {}
    clocks = sorted((report.together, node) for node, report in reports.items() if report.together is not None)
    if not clocks:
        return {}
    middle = clocks[(len(clocks) - 1) // 2][0]
    return {
        node: f"its clock is {clock - middle:+.1f} s off"
        for clock, node in clocks
        if abs(clock - middle) > clock_seconds
    }


def unexplained(reports: Mapping[str, NodeReport]) -> str | None:
    """Why the check failed though no node is bad by itself; None where it did not."""
    errors = sorted({report.error for report in reports.values() if report.error is not None})
    return "; ".join(errors) or None
