"""A teacher's endpoint on loopback that speaks OpenAI's and Anthropic's wire forms, and fails as it is told.

A prompt says by a word in brackets how it is served: [429x2] twice 429, then an answer; [500] always 500;
[pause] 429 with 0.4 s to wait; [hang], [half], [json], [shape], [nousage], [empty], [cut], [refusal];
others are answered at once.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = ["tiny-teacher", "gpt-4o-mini", "claude-haiku-4-5", "gpt-4.1"]
MODES = "429|500|529|pause|hang|half|json|shape|nousage|empty|cut|refusal|gone"


def mode_of(prompt):
    """How it is served, and how often before it is answered all the same."""
    found = re.search(rf"\[({MODES})(?:x(\d+))?\]", prompt)
    return found.groups() if found else ("", None)


class MadeTeacher:
    """What was asked and what was answered, by prompt; an answer counts as paid once it is sent whole."""

    def __init__(self):
        self.tries, self.paid, self.keys, self.bodies = Counter(), Counter(), set(), []
        self.times, self.lock, self.seconds, self.unfit = [], threading.Lock(), 0.0, None
        self.under_way = self.most_under_way = 0
        self.batches, self.files, self.polls = {}, {}, 2  # a batch ends when it is asked for so often
        made = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                made.batch(self, b"") if "batch" in self.path or "files" in self.path else made.models(self)

            def do_POST(self):
                content = self.rfile.read(int(self.headers["content-length"]))
                is_batch = "batch" in self.path or "files" in self.path
                made.batch(self, content) if is_batch else made.serve(self, json.loads(content))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def models(self, request):
        if request.headers.get("authorization") == "Bearer wrong-key-0123456789":
            return self.send(request, 401, {"error": {"message": "Incorrect API key: wrong-key-0123456789"}})
        data = [
            {"id": name, "object": "model", "type": "model", "created": 1, "owned_by": "x"} for name in MODELS
        ]
        return self.send(request, 200, {"object": "list", "data": data, "has_more": False})

    def serve(self, request, body):
        prompt = body["messages"][-1]["content"]
        with self.lock:
            self.tries[prompt] += 1
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.keys |= {
                request.headers[each] for each in ("authorization", "x-api-key") if each in request.headers
            }
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.seconds)
            self.answer(request, body, prompt)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.under_way -= 1

    def answer(self, request, body, prompt):
        mode, times = mode_of(prompt)
        if times and self.tries[prompt] > int(times):
            mode = ""
        if mode.isdigit():
            kind = {"429": "rate_limit_error", "529": "overloaded_error"}.get(mode, "api_error")
            error = {"type": "error", "error": {"type": kind, "message": f"no: {mode}"}}
            return self.send(request, int(mode), error, **{"retry-after-ms": "5"})
        if mode == "pause":
            return self.send(request, 429, {"error": {"message": "slowly"}}, **{"retry-after": "0.4"})
        if mode == "hang":
            time.sleep(2)
            request.close_connection = True
            return None
        if mode == "json":
            return self.send(request, 200, b'{"choices": [{"mess')
        if mode == "shape":
            return self.send(request, 200, {"choices": []})
        said = self.said(prompt, mode)
        form = self.anthropic if "/messages" in request.path else self.openai
        return self.send(request, 200, form(body, prompt, mode, said), half=mode == "half", prompt=prompt)

    @staticmethod
    def said(prompt, mode):
        if mode == "empty":
            return ""
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        return f"def f_{digest[:8]}():\n    return '{digest * (int(digest[0], 16) % 4 + 1)}'\n"

    @staticmethod
    def usage(prompt, said):
        return len(prompt) // 4 + 1, len(said) // 4 + 1

    def openai(self, body, prompt, mode, said):
        read, written = self.usage(prompt, said)
        finish = {"cut": "length", "refusal": "content_filter"}.get(mode, "stop")
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        message = {"role": "assistant", "content": said}
        choices = [{"index": 0, "finish_reason": finish, "message": message}]
        made = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": choices,
        }
        return made if mode == "nousage" else made | {"usage": usage}

    def anthropic(self, body, prompt, mode, said):
        read, written = self.usage(prompt, said)
        finish = {"cut": "max_tokens", "refusal": "refusal"}.get(mode, "end_turn")
        usage = {"input_tokens": read, "output_tokens": written}
        made = {"id": "x", "type": "message", "role": "assistant", "model": body["model"]}
        made |= {"content": [{"type": "text", "text": said}], "stop_reason": finish, "stop_sequence": None}
        return made if mode == "nousage" else made | {"usage": usage}

    def batch(self, request, content):
        """OpenAI's files and batches, and Anthropic's batches."""
        path = request.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if path.endswith("/files"):
            lines = [line for line in content.split(b"\n") if line.startswith(b'{"custom_id"')]
            self.files["input"] = [json.loads(line) for line in lines]
            return self.send(request, 200, {"id": "input", "object": "file"})
        if path.endswith(("/content", "/results")):
            return self.send(request, 200, self.files[parts[-2]].encode())
        if content:
            name, asked = f"batch{len(self.batches) + 1}", json.loads(content)
            entries = asked.get("requests") or self.files["input"]
            bodies = {each["custom_id"]: each.get("params") or each["body"] for each in entries}
            self.batches[name] = {"bodies": bodies, "asked": 0, "metadata": asked.get("metadata")}
            return self.send(request, 200, self.shown(name, "messages" in path))
        if path.endswith("/batches"):
            data = [self.shown(name, "messages" in path) for name in reversed(self.batches)]
            return self.send(request, 200, {"object": "list", "data": data, "has_more": False})
        self.batches[parts[-1]]["asked"] += 1
        return self.send(request, 200, self.shown(parts[-1], "messages" in path))

    def shown(self, name, is_anthropic):
        batch = self.batches[name]
        ended = batch["asked"] >= self.polls
        if ended and name not in self.files:
            bodies = batch["bodies"].items()
            self.files[name] = "".join(self.result(key, body, is_anthropic) for key, body in bodies)
        if is_anthropic:
            counts = dict.fromkeys(("canceled", "errored", "expired", "succeeded"), 0)
            made = {
                "id": name,
                "type": "message_batch",
                "processing_status": "ended" if ended else "in_progress",
            }
            made |= {"created_at": datetime.now(UTC).isoformat(), "expires_at": datetime.now(UTC).isoformat()}
            url = f"{self.url}/v1/messages/batches/{name}/results" if ended else None
            return made | {
                "request_counts": {**counts, "processing": len(batch["bodies"])},
                "results_url": url,
            }
        made = {"id": name, "object": "batch", "status": "completed" if ended else "in_progress"}
        made |= {"metadata": batch["metadata"], "created_at": int(time.time())}
        return made | {"output_file_id": name if ended else None, "error_file_id": None}

    def result(self, key, body, is_anthropic):
        prompt = body["messages"][-1]["content"]
        mode, _ = mode_of(prompt)
        self.tries[prompt] += 1
        if mode == "gone":
            return ""
        if mode == "500":
            error = {"type": "error", "error": {"type": "api_error", "message": "no: 500"}}
            failed = {"type": "errored", "error": error}
            other = {"response": {"status_code": 500, "body": error}, "error": None}
            return json.dumps({"custom_id": key} | ({"result": failed} if is_anthropic else other)) + "\n"
        form = self.anthropic if is_anthropic else self.openai
        answer = {} if mode == "shape" else form(body, prompt, mode, self.said(prompt, mode))
        self.paid[prompt] += 1
        done = {"type": "succeeded", "message": answer}
        other = {"response": {"status_code": 200, "body": answer}, "error": None}
        return json.dumps({"custom_id": key} | ({"result": done} if is_anthropic else other)) + "\n"

    def send(self, request, status, content, *, half=False, prompt=None, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": len(content),
            **headers,
        }.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if half else content)
        request.wfile.flush()
        if half:
            request.close_connection = True
        elif prompt is not None:
            with self.lock:
                self.paid[prompt] += 1


@contextmanager
def made_teacher():
    """Inside, an endpoint answers on loopback."""
    made = MadeTeacher()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()
