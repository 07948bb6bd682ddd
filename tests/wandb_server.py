"""A server that W&B's client takes for its own: as much of one as a run that begins, logs and ends needs (wandb 0.31)."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TYPES: dict[str, dict[str, list[Any]]] = {
    name: {"fields": []} for name in ("QueryType", "MutationType", "ServerInfoType")
}
_VIEWER = {"id": "u", "entity": "team", "username": "u", "email": "u@x", "admin": False, "flags": "{}"}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body) if "upload" not in self.path and body else {}
        answer = json.dumps(self._reply(asked)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        server: Any = self.server
        if "file_stream" in self.path:
            history = asked.get("files", {}).get("wandb-history.jsonl", {"content": []})
            server.rows += [json.loads(row) for row in history["content"]]
            return {"exitcode": None, "limits": {}}
        query, given = asked.get("query", ""), asked.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "b", "name": given.get("name"), "displayName": "run", "description": None}
            bucket |= {"config": given.get("config"), "sweepName": None, "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query:
            return {
                "data": {"model": {"id": "p", "name": "tests", "entity": {"id": "e", "name": "team"}, "bucket": None}}
            }
        if "viewer" in query:
            return {"data": {"viewer": {**_VIEWER, "teams": {"edges": []}}, "serverInfo": None}}
        if "__type" in query or "__schema" in query:
            return {"data": {**_TYPES, "TypeInfo": None}}
        if "createRunFiles" in query:
            where = f"http://127.0.0.1:{server.server_port}/upload"
            files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in given.get("files", [])]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the names that http.server looks for

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def wandb_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the address of a server on loopback, and the rows of history that it gets."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.rows = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.rows
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
