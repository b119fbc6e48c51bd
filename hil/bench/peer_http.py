"""What the HTTP door is held against: FastAPI routes that do nothing, on uvicorn with the daemon's settings.

/lean takes the request as it is, decodes its JSON and answers; /usual is what FastAPI's own pages show: it decodes into
a parameter and encodes what is returned; /raw reads bytes into an array. Each answers the same document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse


def application(answer: dict[str, Any]) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.post("/lean")
    async def lean(request: Request) -> JSONResponse:
        document = await request.json()
        assert document["inputs"]
        return JSONResponse(answer)

    @app.post("/usual")
    async def usual(document: dict[str, Any]) -> dict[str, Any]:
        assert document["inputs"]
        return answer

    @app.post("/raw")
    async def raw(request: Request) -> JSONResponse:
        array = np.frombuffer(await request.body(), np.float32)
        assert array.size
        return JSONResponse(answer)

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer", type=Path, help="JSON document to answer; default: a small one")
    args = parser.parse_args()
    answer = json.loads(args.answer.read_text()) if args.answer else {"answer": 42}
    uvicorn.run(
        application(answer),
        host="127.0.0.1",
        port=args.port,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
