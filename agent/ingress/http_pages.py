"""The pages a browser gets: state, and the list of operations. Self-contained, for gateways without a way out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

Page = Callable[[Request], Awaitable[Response]]


def status_page() -> Page:
    """`page.html` with `page.css` and `page.js` in it, read once."""
    html, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    html = html.replace("<style>page.css</style>", f"<style>\n{style}</style>")
    response = _page(html.replace("<script>page.js</script>", f"<script>\n{script}</script>"))

    async def page(request: Request) -> Response:
        """The state of the gateway, for people."""
        return response()

    return page


def docs_page(openapi: Callable[[], Mapping[str, Any]]) -> Page:
    """The operations of the OpenAPI document."""
    made: list[Callable[[], Response]] = []

    async def page(request: Request) -> Response:
        """The operations, for people."""
        if not made:
            made.append(_page(_document(openapi())))
        return made[0]()

    return page


def _page(html: str) -> Callable[[], Response]:
    """A page that may run what it holds itself and nothing else."""
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes('script', html)}",
            f"style-src {_hashes('style', html)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    body = html.encode()
    return lambda: Response(body, headers=headers, media_type="text/html")


def _hashes(tag: str, html: str) -> str:
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    ]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


_STYLE = """
:root { color-scheme: light dark; --line: #d5dae1; --soft: #f3f5f8; --quiet: #55606e; --page: #fff; --text: #161b22; }
@media (prefers-color-scheme: dark) {
  :root { --line: #303843; --soft: #171c23; --quiet: #9aa6b4; --page: #0f1318; --text: #e6eaf0; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem;
  background: var(--page); color: var(--text); }
h1 { font-size: 1.6rem; margin: 0; } h2 { margin: 2.5rem 0 .25rem; font-size: 1.2rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
h2 code { font-size: 1.1rem; } p { margin: .25rem 0 .75rem; } .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .75rem; overflow-x: auto;
  font-size: .85rem; max-height: 26rem; }
a { color: inherit; }
"""


def _document(api: Mapping[str, Any]) -> str:
    info = api["info"]
    schemas = api.get("components", {}).get("schemas", {})
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}: operations</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f'<p class="quiet">{escape(info.get("summary", ""))} '
        '<a href="/openapi.json">OpenAPI document</a> · <a href="/">status page</a></p>'
        + "".join(_operations(api, schemas))
        + "</body></html>"
    )


def _operations(api: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{_prose(operation.get('description', ''))}</p>"
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                yield f"<h3>Body: {escape(media)}</h3>"
                yield _schema(content, schemas)
            if operation.get("parameters"):
                yield "<h3>Query parameters</h3>"
                yield _table(
                    ("name", "type", "meaning"),
                    (
                        (p["name"], _type(p.get("schema", {})), p.get("description", ""))
                        for p in operation["parameters"]
                    ),
                )
            yield "<h3>Responses</h3>"
            yield _table(
                ("status", "body", "meaning"),
                (
                    (status, _bodies(response), response.get("description", ""))
                    for status, response in operation.get("responses", {}).items()
                ),
            )
            yield from _answer(operation, schemas)


def _answer(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    content = operation.get("responses", {}).get("200", {}).get("content", {}).get("application/json")
    if content is not None and "$ref" in content.get("schema", {}):
        yield "<h3>Answer</h3>"
        yield _schema(content, schemas)


def _schema(content: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    schema = content.get("schema", {})
    schema = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    html = ""
    if "properties" in schema:
        required = schema.get("required", ())
        html += _table(
            ("key", "type", "meaning"),
            (
                (name if name not in required else f"{name} *", _type(value), value.get("description", ""))
                for name, value in schema["properties"].items()
            ),
        )
    example = content.get("example", next(iter(schema.get("examples", [])), None))
    if example is not None:
        html += f"<p>{_prose(example)}</p>" if isinstance(example, str) else f"<pre>{escape(_compact(example))}</pre>"
    return html


def _compact(example: Any) -> str:
    """Indented JSON whose arrays of numbers stay on one line."""
    text = json.dumps(example, indent=2)
    return re.sub(r"\[[\s\d.,e-]+\]", lambda match: " ".join(match.group().split()), text)


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    limits = [f"{sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">")) if key in schema]
    limits += [f"≤ {schema['maximum']}"] if "maximum" in schema else []
    return " ".join([str(schema.get("type", "")), *limits])


def _bodies(response: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{media} {_type(content.get('schema', {}))}".strip() for media, content in response.get("content", {}).items()
    )


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(head: tuple[str, ...], rows: Any) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{_prose(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div>'
