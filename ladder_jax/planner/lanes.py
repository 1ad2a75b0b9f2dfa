"""Draws timelines: what a device computes and what it sends, one above the other."""

BLOCKS = {"attention": "#4c78a8", "mlp": "#72b7b2", "attention+mlp": "#5f97ad"}
HIDDEN, EXPOSED, OTHER = "#59a14f", "#e15759", "#bab0ac"


def draw(path, timelines):
    """Writes a PNG with a pair of lanes for every timeline: compute above, communication below.

    Two layers from the middle of the stack are shown, for as long as the longest timeline takes for them. Green is sent
    while the device is at work (prefetching weights included), red is waited for.

    Args:
      path: of the PNG.
      timelines: (title, timeline.Timeline, block_of) for each, with plan.block_of.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    pieces = [
        (title, _middle(played, block_of)) for title, played, block_of in timelines
    ]
    longest = max(end - start for _, (start, end, *_) in pieces) * 1e6
    figure, axes = plt.subplots(
        len(pieces),
        1,
        figsize=(12, 0.5 + 1.1 * len(pieces)),
        sharex=True,
        squeeze=False,
    )
    for ax, (title, (first, end, spans, collectives)) in zip(axes[:, 0], pieces):
        for start, stop, part in spans:
            ax.broken_barh(
                [((start - first) * 1e6, (stop - start) * 1e6)],
                (1.05, 0.8),
                color=BLOCKS.get(part, OTHER),
            )
        for start, stop, waits in collectives:
            ax.broken_barh(
                [((start - first) * 1e6, (stop - start) * 1e6)],
                (0.15, 0.8),
                color=HIDDEN,
            )
            for a, b in waits:
                if min(b, stop) > max(a, start):
                    ax.broken_barh(
                        [
                            (
                                (max(a, start) - first) * 1e6,
                                (min(b, stop) - max(a, start)) * 1e6,
                            )
                        ],
                        (0.15, 0.8),
                        color=EXPOSED,
                    )
        ax.set(
            ylim=(0, 2),
            xlim=(0, longest),
            yticks=[0.55, 1.45],
            yticklabels=["communicates", "computes"],
        )
        ax.set_title(f"{title}: {(end - first) * 1e6:,.0f} us", loc="left", fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False, labelsize=8)
    axes[-1, 0].set_xlabel("microseconds, two layers from the middle of the stack")
    names = {
        "attention": BLOCKS["attention"],
        "MLP": BLOCKS["mlp"],
        "sent while it works": HIDDEN,
        "waited for": EXPOSED,
    }
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in names.items()],
        ncols=4,
        fontsize=8,
        loc="upper right",
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_size_inches()[1]))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _middle(played, block_of):
    """(start, end, spans, collectives) of two layers from the middle: spans as (start, end, block), collectives as
    (start, end, the waits)."""
    blocks = [(span, *block_of(span.scope)[1:]) for span in played.spans]
    layers = list(dict.fromkeys(layer for _, layer, _ in blocks if layer))
    if (
        len(layers) > 3
    ):  # XLA mixes neighbours: a layer begins here with what its attention computes longest
        middle = (len(layers) - 1) // 2
        attention = (
            [
                span
                for span, layer, part in blocks
                if layer == name
                and part.startswith("attention")
                and span.name != "prefetch"
            ]
            for name in (layers[middle], layers[middle + 2])
        )
        start, end = (
            max(spans, key=lambda span: span.end - span.start).start
            for spans in attention
        )
    else:
        inside = [span for span, layer, _ in blocks if layer]
        start, end = inside[0].start, max(span.end for span in inside)
    spans = [
        (max(span.start, start), min(span.end, end), part)
        for span, _, part in blocks
        if span.end > start and span.start < end
    ]
    waits = [
        (a, b)
        for a, b in zip(
            [s.end for s in played.spans], [s.start for s in played.spans[1:]]
        )
        if b - a > 1e-9
    ]
    return (
        start,
        end,
        spans,
        [
            (max(c.start, start), min(c.end, end), waits)
            for c in played.collectives
            if c.end > start and c.start < end
        ],
    )
