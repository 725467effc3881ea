"""Slurm's lists of nodes and tasks."""

import pytest

from launcher.start.nodes import expand_nodes, rendezvous_port, tasks_on_node


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,2],login-a", ["gpu08", "gpu09", "gpu10", "gpu2", "login-a"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a,b[1]-ib", ["a", "b1-ib"]),
        ("", []),
    ],
)
def test_expand_nodes(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


def test_expand_nodes_refuses_other_text() -> None:
    with pytest.raises(ValueError, match="not a list of nodes"):
        expand_nodes("n[1-2")


def test_tasks_on_node() -> None:
    assert [tasks_on_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]
    with pytest.raises(ValueError, match="no node 3"):
        tasks_on_node("4(x2),3", 3)


def test_ports_of_neighbouring_jobs_differ_and_are_not_ephemeral() -> None:
    ports = [rendezvous_port(job, step) for job in range(4_000_000, 4_000_500) for step in range(3)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 12000 and max(ports) < 32768
