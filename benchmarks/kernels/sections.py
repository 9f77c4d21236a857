# SPDX-License-Identifier: Apache-2.0
"""The figures of a result file as Markdown: a summary, and all of them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kernels.results import LABELS, OURS, Results, first

# vLLM's int4 kernels for NVIDIA GPUs; a layer is served by one that takes it.
SERVED = ("marlin", "machete")
SUMMARY_TOKENS = (1, 8, 16, 64, 512, 2048)
# From and to so many tokens.
RANGES = ((1, 8), (9, 16), (17, 128), (129, 8192))
FLOOR_TOKENS = 16
NOTHING = "-"


def summary(results: Results) -> str:
    """One table: a row per layer, and in each cell ours, the faster of vLLM's, and BF16."""
    tokens = [number for number in SUMMARY_TOKENS if number in results.tokens()]
    rows = [
        [layer, f"{n} x {k}", *(_summary_cell(results, layer, number) for number in tokens)]
        for layer, (n, k) in results.layers().items()
    ]
    head = ["layer", "N x K", *_token_heads(tokens)]
    return "\n".join(
        [
            _origin(results),
            "",
            "Microseconds: ours / the faster of Marlin and Machete, vLLM's int4 kernels / BF16 "
            "through cuBLAS.",
            f"The least is bold.{_group_note(results)}",
            "",
            *markdown_table(head, rows),
        ]
    )


def full(results: Results) -> str:
    """Gains over the rivals, shares of the read floor, all times, errors and refusals."""
    parts = [
        [_origin(results)],
        _gains(results),
        _floor_shares(results),
        *(_layer(results, layer) for layer in results.layers()),
        _errors(results),
        _refusals(results),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def format_us(us: float | None) -> str:
    """Microseconds with three digits or more."""
    if us is None:
        return NOTHING
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _origin(results: Results) -> str:
    """Where the figures are from."""
    origin = f"Made by `benchmarks/kernels/table.py` from `{results.name}`: {results.machine()}."
    return origin if results.data["complete"] else f"{origin} The run did not come to its end."


def _group_note(results: Results) -> str:
    """The group size, and which of vLLM's kernels take which layers in smaller groups only."""
    asked = results.data["problem"]["group_size"]
    smaller: dict[tuple[str, int], list[str]] = {}
    for layer in results.layers():
        for peer in SERVED:
            size = results.group_size(layer, peer)
            if size not in (None, asked):
                smaller.setdefault((layer, size), []).append(LABELS[peer])
    notes = [
        f" {' and '.join(peers)} take{'s' if len(peers) == 1 else ''} {layer} in groups of {size}"
        " only."
        for (layer, size), peers in smaller.items()
    ]
    return f" Groups of {asked}.{''.join(notes)}"


def _summary_cell(results: Results, layer: str, tokens: int) -> str:
    """Ours / the faster of vLLM's / BF16, the least in bold."""
    served = first([results.us(layer, tokens, peer) for peer in SERVED])
    return " / ".join(
        _bold_least([results.us(layer, tokens, OURS), served, results.us(layer, tokens, "bf16")])
    )


def _bold_least(values: Sequence[float | None]) -> list[str]:
    """The microseconds as text, the least, and what looks like it, in bold."""
    texts = [format_us(value) for value in values]
    least = format_us(first(values))
    return [f"**{text}**" if text == least != NOTHING else text for text in texts]


def _gains(results: Results) -> list[str]:
    """Geometric means of the rivals' times over ours."""
    rivals = [peer for peer in results.peers() if peer != OURS]
    ranges = [
        (low, high) for low, high in RANGES if any(low <= t <= high for t in results.tokens())
    ]
    rows = []
    for peer in rivals:
        gains = [results.gain(peer, low, high) for low, high in ranges]
        rows.append([LABELS[peer], *(NOTHING if gain is None else f"{gain:.2f}" for gain in gains)])
    if not rows or OURS not in results.peers():
        return []
    head = ["gain over", *(f"{low} to {high} tokens" for low, high in ranges)]
    return [
        "How many times as fast ours is as each contestant: the geometric mean over the layers and "
        "numbers of tokens that both ran.",
        "",
        *markdown_table(head, rows),
    ]


def _floor_shares(results: Results) -> list[str]:
    """The read floor over our time, a row per layer."""
    tokens = [number for number in results.tokens() if number <= FLOOR_TOKENS]
    rows = []
    for layer in results.layers():
        shares = [results.floor_share(layer, number, OURS) for number in tokens]
        if any(share is not None for share in shares):
            floor = format_us(results.us(layer, None, "read_floor"))
            cells = [NOTHING if share is None else f"{100 * share:.0f} %" for share in shares]
            rows.append([layer, floor, *cells])
    if not rows:
        return []
    return [
        "The read floor is the time of a kernel that only reads the packed integers. Its share of "
        "our time:",
        "",
        *markdown_table(["layer", "floor, us", *_token_heads(tokens)], rows),
    ]


def _layer(results: Results, layer: str) -> list[str]:
    """All times of one layer, a row per contestant, the least of each column in bold."""
    peers = [
        peer
        for peer in results.peers()
        if any(results.us(layer, number, peer) for number in results.tokens())
    ]
    tokens = [
        number
        for number in results.tokens()
        if any(results.us(layer, number, peer) for peer in peers)
    ]
    columns = [
        _bold_least([results.us(layer, number, peer) for peer in peers]) for number in tokens
    ]
    rows = [
        [_with_groups(results, layer, peer), *(column[index] for column in columns)]
        for index, peer in enumerate(peers)
    ]
    n, k = results.layers()[layer]
    return [
        f"{layer}, {n} x {k}, microseconds:",
        "",
        *markdown_table(["", *_token_heads(tokens)], rows),
    ]


def _with_groups(results: Results, layer: str, peer: str) -> str:
    """A contestant's label, with its group size where it is not the one that was asked for."""
    size = results.group_size(layer, peer)
    other = size not in (None, results.data["problem"]["group_size"])
    return f"{LABELS[peer]}, groups of {size}" if other else LABELS[peer]


def _errors(results: Results) -> list[str]:
    """The greatest error of each contestant."""
    errors = {LABELS[peer]: results.greatest_error(peer) for peer in results.peers()}
    known = [f"{label} {error:.1e}" for label, error in errors.items() if error is not None]
    return [
        "Greatest mean relative error against the fp64 product of the weights that each packed: "
        f"{', '.join(known)}."
    ]


def _refusals(results: Results) -> list[str]:
    """Who did not run where, and why; the layers of one reason together."""
    layers: dict[tuple[str, str], list[str]] = {}
    for refusal in results.data["refused"]:
        reason = " ".join(refusal["reason"].split()).replace("|", "\\|")
        at = "" if refusal.get("tokens") is None else f" at {refusal['tokens']} tokens"
        layers.setdefault((refusal["peer"], reason), []).append(f"{refusal['layer']}{at}")
    lines = [
        f"- {LABELS.get(peer, peer)}, {', '.join(names)}: {reason}"
        for (peer, reason), names in layers.items()
    ]
    return ["Not run:", "", *lines] if lines else []


def _token_heads(tokens: Sequence[int]) -> list[str]:
    """Column heads; the first says what the numbers are."""
    heads = [str(number) for number in tokens]
    return [f"{heads[0]} token{'' if tokens[0] == 1 else 's'}", *heads[1:]] if heads else []


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, a line each."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]
