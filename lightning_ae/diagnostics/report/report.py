"""What the monitors found, as data, as a table and as a page with pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning_ae.diagnostics.report import page, printed, saved
from lightning_ae.diagnostics.report.record import Record


class Report(Record):
    """Findings, and the figures behind them; it prints as a table.

    :attr:`verdict` says it in one sentence, :meth:`to_html` and :meth:`save` give the page, :meth:`load` reads a saved
    report, and :meth:`plot` gives matplotlib's figure and axes. Two reports are equal if they hold the same.

    Attributes:
        findings: what is wrong, the worst first.
        sites: figures of each activation, by name: number of units and of dead ones, median firing ``frequency``, share
            of elements that are ``flat``, ``transmission``, and ``n``, the examples looked at (again in each epoch).
        layers: gradient norm and update-to-weight ratio for each layer, by name.
        latent: the summary of :class:`LatentSparsityMonitor`.
        output: ``loss``; ``fvu`` and ``spread``, see there; ``contrast``, how much the mean output varies over an event
            relative to the data's mean; ``outside``, share of the data that the output cannot reach; and the like.
        history: loss and fraction of variance unexplained over the fit.
        frequencies: firing frequency of each unit, by site.
        over_time: transmission of each site, by step.
        compared: what the losses were heard to compare, by the name of the loss; None if nobody listened.
        first_seen: the optimizer step at which a finding was first certain, by the name of its cause; of those of which
            it is known.
        stopped: why the fit was ended early by a callback of this package; None if it was not.
        curves: by name the steps and values of ``loss`` at each look, of ``relative``, its error over that of the best
            constant, and of the losses that validation has logged.
        dormancy: mean size of each unit's output over that of the site's mean, by site, where units have no hard zero.
        latents: ``frequency``, ``variance`` and, of a Gaussian code, ``kl`` (nats) of each latent.
        examples: inputs beside reconstructions; None where the model does not reconstruct.
        about: the model's name, its number of parameters, and the like.

    Example:
        >>> report = Report(findings=[], latent={"l0": 4.0})
        >>> print(report)
        Nothing was found to be wrong.
        <BLANKLINE>
        Latent
          measure  value
          l0       4
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [path.name for path in report.save(folder)]
        ...     Report.load(folder) == report
        True
        >>> names[:3]
        ['diagnostics.json', 'diagnostics.html', 'diagnostics.md']
    """

    def __str__(self) -> str:
        return printed.as_text(self)

    def __eq__(self, other: object) -> bool:
        return saved.to_dict(self) == saved.to_dict(other) if isinstance(other, Report) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def to_markdown(self) -> str:
        """Verdict, findings and tables in Markdown."""
        return printed.as_markdown(self)

    def to_html(self) -> str:
        """The page: one HTML file that loads nothing, runs no script, and shows all names and texts as text."""
        return page.as_html(self)

    def save(self, folder: str | Path) -> list[Path]:
        r"""Write ``diagnostics.json``, ``.html`` and ``.md``, and with matplotlib pictures beside them.

        The JSON is strict (RFC 8259); numbers that are not finite are the texts ``"NaN"``, ``"Infinity"`` and
        ``"-Infinity"``. Its schema, version 1::

            {"kind": "lightning_ae.diagnostics", "version": 1, "verdict": text,
             "findings": [{"severity": "error"|"warning"|"info", "site": text, "measure": text, "value": number,
                           "n": integer, "evidence": text, "advice": text, "cause": text, "symptoms": [text, …],
                           "change": [text, 1|-1]|null, "remedies": [{"describe": text, "python": text}, …]}, …],
             "sites": {site: {column: number|text, …}, …}, "layers": {layer: {column: number, …}, …},
             "latent": {measure: number, …}, "output": {measure: number, …},
             "history": [{"step": integer, "loss": number, "fvu": number, "spread": number}, …],
             "frequencies": {site: [number, …], …}, "dormancy": {site: [number, …], …},
             "latents": {measure: [number, …], …}, "over_time": {step: {site: number, …}, …},
             "compared": {loss: text, …}|null, "first_seen": {cause: step, …}, "stopped": text|null,
             "curves": {name: {"steps": [integer, …], "values": [number, …]}, …},
             "examples": null|{"stage": text, "of": integer, "shape": [integer, …], "low": number, "high": number,
                               "first": [example, …], "worst": [example, …]},
             "about": {text: text, …}}
            example = {"number": integer, "error": number, "x": picture, "x_hat": picture, "difference": picture}
            picture = base64 of a PNG, or [number, …]

        Args:
            folder: where; made if it is not there.

        Returns:
            Paths of what was written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [saved.write(self, folder)]
        pictures: list[Path] = []
        if importlib.util.find_spec("matplotlib") is not None:
            from lightning_ae.diagnostics.report.pictures import draw

            pictures = draw(self, folder)
        text = self.to_markdown() + "\n".join(f"![{path.stem}]({path.name})" for path in pictures) + "\n"
        for name, content in (("diagnostics.html", self.to_html()), ("diagnostics.md", text)):
            paths.append(folder / name)
            paths[-1].write_text(content, encoding="utf-8", errors="replace")
        return paths + pictures

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """A report that was saved; its remedies are words and code, and cannot be applied.

        Args:
            path: ``diagnostics.json``, or the folder in which it is.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is no report, or one of a later version than this package reads.
        """
        return cls(**saved.read(path))

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw with matplotlib, as torchmetrics' metrics do.

        Args:
            ax: matplotlib's axes for the loss over the steps, findings marked; None for an overview of its own: loss,
                gradients, units and latents, as far as there are figures.

        Returns:
            ``(figure, axes)``; of the overview an array of axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("Report.plot needs matplotlib: pip install matplotlib.")
        from lightning_ae.diagnostics.report.pictures import plot

        drawn: tuple[Any, Any] = plot(self, ax)
        return drawn
