"""The drawing of `edge-agent models calibrate --plot`: accuracy against offload, beside asking again by chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agent.core.errors import ConfigError

if TYPE_CHECKING:
    from agent.cli_calibrate import Report


def draw(report: Report, path: Path) -> None:
    """One panel for each variant that has a curve. Raises `ConfigError` without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError(["--plot: needs matplotlib: pip install matplotlib"]) from None
    family, measured, reference = report.family.name, report.measured, report.measured[-1]
    panels = [one for one in measured if one.curve is not None]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.0), sharey=True, squeeze=False)
    for one, panel in zip(panels, axes[0], strict=True):
        cascade, curve = one.calibration.cascade, one.curve
        assert cascade is not None and curve is not None
        best = curve.accuracy[-1]
        panel.axhspan(best - cascade.max_loss, best, color="#cfe8cf", label=f"within {cascade.max_loss:.1%} of it")
        panel.axhline(best, color="#3a7d3a", linewidth=1, label=f"{reference.variant.id} alone")
        panel.plot(curve.offload, curve.accuracy, color="#1f4e9c", label="least sure first")
        panel.plot(curve.offload, curve.random, color="#999999", linestyle="--", label="by chance")
        panel.errorbar(
            [cascade.offload],
            [cascade.accuracy],
            [[cascade.accuracy - cascade.low], [cascade.high - cascade.accuracy]],
            fmt="o",
            color="#b03030",
            capsize=3,
            label=f"threshold {cascade.threshold:.3f}, cross-validated",
        )
        panel.set_title(f"{family}/{one.variant.id}")
        panel.set_xlabel("share asked again")
        panel.legend(loc="lower right", fontsize=8)
    axes[0][0].set_ylabel(f"accuracy on {measured[0].calibration.samples} held-out samples")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
