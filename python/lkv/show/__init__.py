"""A page that shows which tokens of a text survive in a cache: one HTML file that loads nothing.

from lkv.show import page

shown = page(model, tokenizer, text, ["snapkv", "kvzip"], "page.html", retention=0.15, questions=["Who ...?"])
shown.methods[0].answers        # what is on the page is here as well
"""

from __future__ import annotations

from lkv.show.collect import Method, Shown, collect
from lkv.show.html import page, write

__all__ = ["Method", "Shown", "collect", "page", "write"]
