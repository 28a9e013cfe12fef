"""One CUDA graph: a fixed sequence of kernels, captured once and replayed without issuing them one by one.

A replay reads and writes the same buffers as the capture did. What changes from inference to inference (pixels, prompt
and its length, state, noise) is contents of those buffers, so a new instruction replays the same graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class GraphNode:
    """One node: its kind (``"kernel"``, ``"memcpy"``, ...), and of a kernel its name, grid and block."""

    kind: str
    name: str = ""
    grid: tuple[int, int, int] = (0, 0, 0)
    block: tuple[int, int, int] = (0, 0, 0)


class CapturedGraph:
    """Captures what ``issue`` enqueues on the current stream.

    ``issue`` runs once eagerly before, so that everything lazy (compiling, loading modules) has happened, and once
    under capture. It must not allocate on the host or wait for the GPU.

    Args:
        issue: enqueues kernels that work on buffers which live as long as this graph.
        keep: anything else that the kernels read and that must not be freed before the graph.
    """

    def __init__(self, issue: Callable[[], None], keep: Sequence[Any] = ()) -> None:
        self._keep = (issue, *keep)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            issue()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = _new_graph()
        # "thread_local": other threads (a server's, say) may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            issue()
        if hasattr(self._graph, "instantiate"):
            self._graph.instantiate()  # here, not in the first replay

    def replay(self) -> None:
        """Enqueue the whole graph on the current stream; allocates nothing and does not wait."""
        self._graph.replay()

    def nodes(self) -> list[GraphNode]:
        """Every node of the captured graph, by cuda-python.

        Raises:
            ValueError: cuda-python is not installed, or torch cannot hand out the graph.
        """
        driver = _driver()
        handle = self._handle(driver)
        _, count = _ask(driver.cuGraphGetNodes(handle))
        found, _ = _ask(driver.cuGraphGetNodes(handle, count))
        return [_describe(driver, node) for node in found]

    def write_dot(self, path: str | Path) -> None:
        """The graph's nodes and edges for Graphviz (``dot -Tsvg``), by the CUDA driver.

        Raises:
            ValueError: as in :meth:`nodes`, or a path that cannot be written.
        """
        driver = _driver()
        flags = driver.CUgraphDebugDot_flags.CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_PARAMS
        (status,) = driver.cuGraphDebugDotPrint(self._handle(driver), str(path).encode(), flags)
        if int(status) != 0:
            raise ValueError(f"the CUDA driver cannot write the graph to {path}: {status}")

    def _handle(self, driver: Any) -> Any:
        if not hasattr(self._graph, "raw_cuda_graph"):
            raise ValueError(f"torch {torch.__version__} cannot hand out a captured graph; torch 2.8 and newer can")
        return driver.CUgraph(self._graph.raw_cuda_graph())


def summarize(nodes: Sequence[GraphNode]) -> dict[str, Any]:
    """JSON-ready: nodes in all, by kind, and of each kernel how often it runs and with which grids."""
    kernels: dict[str, dict[str, Any]] = {}
    for node in nodes:
        if node.kind == "kernel":
            entry = kernels.setdefault(node.name, {"launches": 0, "grids": []})
            entry["launches"] += 1
            if list(node.grid) not in entry["grids"]:
                entry["grids"].append(list(node.grid))
    return {"nodes": len(nodes), "kinds": dict(Counter(node.kind for node in nodes)), "kernels": kernels}


def _new_graph() -> torch.cuda.CUDAGraph:
    if hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return torch.cuda.CUDAGraph(keep_graph=True)
    return torch.cuda.CUDAGraph()


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ValueError(
            f"the nodes of a CUDA graph are read by cuda-python ({error}): pip install 'pi0-engine[gpu]'"
        ) from error
    return driver


def _describe(driver: Any, node: Any) -> GraphNode:
    (kind,) = _ask(driver.cuGraphNodeGetType(node))
    name = kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
    if name != "kernel":
        return GraphNode(name)
    (p,) = _ask(driver.cuGraphKernelNodeGetParams(node))
    # Kernels loaded as a library have a CUkernel, others a CUfunction.
    answer = driver.cuKernelGetName(p.kern) if int(p.kern) else driver.cuFuncGetName(p.func)
    (kernel,) = _ask(answer)
    return GraphNode(
        name, kernel.decode(), (p.gridDimX, p.gridDimY, p.gridDimZ), (p.blockDimX, p.blockDimY, p.blockDimZ)
    )


def _ask(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a driver call returned behind its status."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver answered {status}")
    return tuple(values)
