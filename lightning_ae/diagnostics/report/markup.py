"""HTML in which what is not markup cannot become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = {"meta", "img", "br", "hr", "col"}


class Markup(str):
    """Text that is HTML already; every other string is escaped where it enters a tag."""

    __slots__ = ()


Content = str | Iterable["Content"] | None


def text(value: str) -> Markup:
    """A string as text: markup escaped, characters that HTML forbids replaced.

    Example:
        >>> text("<img src=x onerror=alert(1)>")
        '&lt;img src=x onerror=alert(1)&gt;'
    """
    if isinstance(value, Markup):
        return value
    allowed = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(value))
    return Markup(html.escape(allowed, quote=True))


def join(content: Content) -> Markup:
    """Strings and markup, however nested, one after another; None is nothing."""
    if content is None:
        return Markup("")
    if isinstance(content, str):
        return text(content)
    return Markup("".join(join(part) for part in content))


def tag(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """An element; ``class_`` and ``aria_label`` give the attributes ``class`` and ``aria-label``, None gives none.

    Example:
        >>> tag("p", "1 < 2", tag("b", "!"), class_="note")
        '<p class="note">1 &lt; 2<b>!</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(f"{value:g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(content)}</{name}>")
