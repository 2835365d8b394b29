"""The graph of a small loss, as text or as a picture: what backward will walk.

    leaf1                          (3, 4) float64
    t1 = softmax(leaf1)            (3, 4)
    t2 = multiply(t1, leaf1)       (3, 4)
    t3 = sum(t2)                   ()

Operations are in the order in which they ran; backward walks them from the last line to the first. An input that needs no gradient is
`_`. The graph remembers the shapes of all results, but only the dtypes of leaves.
"""

from __future__ import annotations

from html import escape

from minimoe.engine.errors import operation
from minimoe.engine.tensor import Edge, Node, Tensor

LIMIT = 100
MOST_INPUTS = 6  # on one line
CHARACTER, LINE, BOX, GAP = 7.3, 16, 44, 26  # of the picture, in pixels


def show_graph(tensor: Tensor, svg: bool = False, limit: int = LIMIT) -> str:
    """Print the graph that backward from this tensor would walk, and return it; with `svg`, return a picture instead.

    Show at most `limit` operations, those nearest to the tensor, and say how many are left out. An operation that backward has freed is
    marked: its inputs are no longer known.
    """
    if limit < 1:
        raise ValueError(f"show_graph: limit ({limit}) must be 1 or more")
    graph = _Graph(tensor, limit)
    if svg:
        return _picture(graph)
    text = "\n".join(graph.lines())
    print(text)
    return text


class _Graph:
    """The newest operations below a tensor, and the leaves that they use, by name."""

    def __init__(self, tensor: Tensor, limit: int) -> None:
        nodes = _nodes(tensor)
        self.left_out = max(len(nodes) - limit, 0)
        self.nodes = nodes[self.left_out :]  # in the order in which they ran
        self.names: dict[tuple[int, int], str] = {}  # of results, by number of the node and index
        self.leaves: dict[int, tuple[str, Tensor]] = {}
        for node in self.nodes:
            for to in node.parents:
                self._add_leaf(to)
            for index in range(len(node.shapes)):
                self.names[node.number, index] = f"t{len(self.names) + 1}"
        if tensor.node is None and tensor.requires_grad:
            self._add_leaf(tensor)
        self.root = "_" if not tensor.requires_grad else self.name((tensor.node, tensor.index) if tensor.node else tensor)

    def _add_leaf(self, to: Edge) -> None:
        if isinstance(to, Tensor) and id(to) not in self.leaves:
            self.leaves[id(to)] = f"leaf{len(self.leaves) + 1}", to

    def name(self, to: Edge) -> str:
        """Return the name of an operation's input."""
        if to is None:
            return "_"
        if isinstance(to, Tensor):
            return self.leaves[id(to)][0]
        return self.names.get((to[0].number, to[1]), "...")  # left out

    def results(self, node: Node) -> list[str]:
        """Return the names of an operation's results."""
        return [self.names[node.number, index] for index in range(len(node.shapes))]

    def lines(self) -> list[str]:
        """Return the graph as text."""
        if self.root == "_":
            return ["This tensor has no graph: it depends on nothing that requires a gradient."]
        rows = [(name, f"{leaf.shape} {leaf.dtype}") for name, leaf in self.leaves.values()]
        for node in self.nodes:
            shapes = " ".join(str(tuple(shape)) for shape in node.shapes)
            rows.append((f"{', '.join(self.results(node))} = {operation(node.name)}({self._inputs(node)})", shapes))
        width = min(max(len(left) for left, _ in rows) + 3, 42)
        lines = [f"{left:{width}}{right}" if len(left) < width else f"{left}   {right}" for left, right in rows]
        if self.left_out:
            lines.insert(len(self.leaves), f"...   {self.left_out} operations that ran earlier are left out: limit={len(self.nodes)}")
        if self.nodes and len(self.nodes[-1].shapes) > 1:
            lines.append(f"The tensor is {self.root}.")
        return lines

    def _inputs(self, node: Node) -> str:
        if node.backward is None:
            return "freed: backward has walked it"
        names = [self.name(to) for to in node.parents]
        more = len(names) - MOST_INPUTS
        return ", ".join(names if more <= 0 else [*names[:MOST_INPUTS], f"and {more} more"])


def _nodes(tensor: Tensor) -> list[Node]:
    """Return all operations that a tensor depends on, in the order in which they ran."""
    found: dict[int, Node] = {}
    waiting = [] if tensor.node is None else [tensor.node]
    while waiting:
        node = waiting.pop()
        if node.number not in found:
            found[node.number] = node
            waiting += [to[0] for to in node.parents if isinstance(to, tuple)]
    return [found[number] for number in sorted(found)]


# ---- the picture -------------------------------------------------------------------------------------------------------------

STYLE = """
svg { font: 12px ui-monospace, monospace; background: #fff; color: #1f2933; }
rect { fill: #e8f0fe; stroke: #4a72b8; } .leaf rect { fill: #e9f7ec; stroke: #3f8f55; } .freed rect { fill: #eee; stroke: #999; }
text { fill: currentColor; text-anchor: middle; } path { fill: none; stroke: #7b8794; } .small { font-size: 10px; }
@media (prefers-color-scheme: dark) {
  svg { background: #14181d; color: #e4e7eb; } rect { fill: #1d2b45; } .leaf rect { fill: #1a3323; } .freed rect { fill: #2a2a2a; }
}
"""


class _Box:
    """A leaf or an operation in the picture."""

    def __init__(self, title: str, shape: str, kind: str, inputs: list[tuple[_Box, str]]) -> None:
        self.title, self.shape, self.kind, self.inputs = title, shape, kind, inputs
        self.row: int = max((box.row + 1 for box, _ in inputs), default=0)
        self.width = CHARACTER * max(len(title), len(shape)) + 16
        self.x = 0.0  # of its centre

    @property
    def y(self) -> float:
        return GAP + self.row * (BOX + GAP)


def _picture(graph: _Graph) -> str:
    rows = _arranged(_boxes(graph))
    boxes = [box for row in rows for box in row]
    note = f"{graph.left_out} operations that ran earlier are left out" if graph.left_out else ""
    width = max([box.x + box.width / 2 for box in boxes] + [CHARACTER * len(note), 60.0]) + GAP
    height = len(rows) * (BOX + GAP) + GAP + LINE * bool(note)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" role="img" aria-label="graph">']
    parts.append(f"<style>{STYLE}</style>")
    parts += [_arrow(box, to, label) for to in boxes for box, label in to.inputs]
    parts += [_drawn(box) for box in boxes]
    if note:
        parts.append(f'<text x="{width / 2:.0f}" y="{height - 10:.0f}" class="small">{note}</text>')
    return "\n".join([*parts, "</svg>"])


def _boxes(graph: _Graph) -> list[_Box]:
    """Return the leaves and operations, each after its inputs."""
    made: dict[str, _Box] = {name: _Box(name, f"{leaf.shape} {leaf.dtype}", "leaf", []) for name, leaf in graph.leaves.values()}
    boxes = list(made.values())
    for node in graph.nodes:
        labels: dict[_Box, list[str]] = {}  # one arrow for all results of an operation that this one uses
        for to in node.parents:
            name = graph.name(to)
            if name in made:
                labels.setdefault(made[name], []).extend([name] * _several(to))
        inputs = [(one, ", ".join(dict.fromkeys(names))) for one, names in labels.items()]
        kind, freed = ("freed", " (freed)") if node.backward is None else ("operation", "")
        box = _Box(operation(node.name) + freed, " ".join(str(tuple(shape)) for shape in node.shapes), kind, inputs)
        made |= dict.fromkeys(graph.results(node), box)
        boxes.append(box)
    if not boxes:
        boxes.append(_Box("no graph", "", "freed", []))
    return boxes


def _several(to: Edge) -> bool:
    return isinstance(to, tuple) and len(to[0].shapes) > 1


def _arranged(boxes: list[_Box]) -> list[list[_Box]]:
    """Place boxes in rows, each below its inputs; a leaf just above the first operation that uses it.

    An arrow over several rows gets an empty box in each row between, so that it does not cross them.
    """
    for box in reversed(boxes):
        users = [other.row for other in boxes if any(one is box for one, _ in other.inputs)]
        if box.kind == "leaf" and users:
            box.row = min(users) - 1
    for box in list(boxes):
        for i, (source, label) in enumerate(box.inputs):
            bend, start = source, (source, label)
            while bend.row < box.row - 1:
                bend = _Box("", "", "bend", [start])
                boxes.append(bend)
                start = bend, ""
            box.inputs[i] = start
    rows = [[box for box in boxes if box.row == row] for row in range(max(box.row for box in boxes) + 1)]
    widest = max(sum(box.width + GAP for box in row) for row in rows)
    for row in rows:
        row.sort(key=lambda box: sum(one.x for one, _ in box.inputs) / len(box.inputs) if box.inputs else widest)
        x = GAP + (widest - sum(box.width + GAP for box in row)) / 2
        for box in row:
            box.x = x + box.width / 2
            x += box.width + GAP
    return rows


def _arrow(box: _Box, to: _Box, label: str) -> str:
    x0, y0, x1, y1 = box.x, box.y + BOX, to.x, to.y
    bend = (y1 - y0) / 2
    path = f'<path d="M{x0:.1f} {y0:.1f} C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"/>'
    return path + (f'<text x="{(x0 + x1) / 2 + 10:.1f}" y="{(y0 + y1) / 2:.1f}" class="small">{label}</text>' if label else "")


def _drawn(box: _Box) -> str:
    if box.kind == "bend":
        return f'<path d="M{box.x:.1f} {box.y:.1f} V{box.y + BOX:.1f}"/>'
    left, second = box.x - box.width / 2, f'<text x="{box.x:.1f}" y="{box.y + 36:.1f}" class="small">{escape(box.shape)}</text>'
    rect = f'<rect x="{left:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{BOX}" rx="6"/>'
    return f'<g class="{box.kind}">{rect}<text x="{box.x:.1f}" y="{box.y + 19:.1f}">{escape(box.title)}</text>{second}</g>'
