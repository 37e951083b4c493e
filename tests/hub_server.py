"""The Hugging Face Hub as far as a push and a download need it: a server on this machine that keeps what it is sent.

Written after what the Hub's own client (huggingface_hub 2.4) asks for and takes as answers, with LFS as the way for
large files. It is strict: a token that is wrong, a hash that does not hold, a commit of what was never sent, a header
that is no YAML are refused. What it cannot show is how the Hub itself behaves (docs/decisions/0017).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".gguf", ".bin")
ORGS = ("our-team",)


@dataclass
class Fault:
    """What goes wrong with the requests that match."""

    method: str
    path: str
    """A regular expression."""
    times: int = 1
    status: int = 0
    """Answered instead; 0: see `drop` and `wait_s`."""
    error: str = ""
    headers: dict = field(default_factory=dict)
    drop: bool = False
    """Close the connection with half of the body read."""
    wait_s: float = 0.0


@dataclass
class Repo:
    private: bool
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """oid and content, by name."""
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        text = json.dumps([self.commits, sorted((name, oid) for name, (oid, _) in self.files.items())])
        return hashlib.sha1(text.encode()).hexdigest()


class Hub:
    """The state, and the server: `with Hub() as hub`."""

    def __init__(self, *, part_bytes: int = 0, largest: int = 0):
        self.tokens = {}  # token: (account, role)
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes, self.largest = part_bytes, largest
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """`METHOD path` of each, in order."""
        self.stored: list[str] = []
        """oid of each large file, each time that all of it was sent."""
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def account(self, token: str, name: str = "me", role: str = "write") -> None:
        self.tokens[token] = (name, role)

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    def __init__(self, status: int, error: str = "", headers: dict | None = None, **fields):
        self.status, self.headers, self.fields = status, headers or {}, {"error": error, **fields}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.place, self.query = unquote(split.path), parse_qs(split.query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.place}")
        fault = self.hub.fault_for(self.command, self.place)
        if fault and fault.drop:
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if fault and fault.wait_s:
            threading.Event().wait(fault.wait_s)
        try:
            if fault and fault.status:
                raise Refused(fault.status, fault.error, fault.headers)
            with self.hub.lock:
                status, content, headers = self._route(body)
        except Refused as refused:
            status, content, headers = refused.status, json.dumps(refused.fields).encode(), refused.headers
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a connection that a fault closed
            super().handle()

    def log_message(self, *args) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, body: bytes) -> tuple[int, bytes, dict]:
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, self.place)
            if found and self.command in method.split():
                made = act(self, body, *found.groups())
                return made if isinstance(made, tuple) else (200, json.dumps(made).encode(), {})
        raise Refused(404, "no such endpoint")

    def _account(self, *, write: bool = False) -> str:
        sent = self.headers.get("Authorization", "")
        if sent.removeprefix("Bearer ") not in self.hub.tokens:
            said = "Invalid credentials in Authorization header"
            raise Refused(401, said, {"X-Error-Message": said})
        name, role = self.hub.tokens[sent.removeprefix("Bearer ")]
        if write and role == "read":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return name

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        owner, who = name.split("/")[0], ""
        repo = self.hub.repos.get(name)
        if write or (repo and repo.private) or self.headers.get("Authorization"):
            who = self._account(write=write)
        mine = who and owner in (who, *ORGS)
        if repo is None or (repo.private and not mine):
            raise Refused(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        if write and not mine:
            raise Refused(403, f"You don't have write access to {name}")
        return repo

    # What a client asks for

    def root(self, body):
        return {}

    def whoami(self, body):
        name = self._account()
        token = {"displayName": "a token", "role": self.hub.tokens[self.headers["Authorization"][7:]][1]}
        orgs = [{"name": org, "roleInOrg": "write"} for org in ORGS]
        return {"type": "user", "name": name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create(self, body):
        who, asked = self._account(write=True), json.loads(body)
        owner = asked["organization"] or who
        name = f"{owner}/{asked['name']}"
        if owner not in (who, *ORGS):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.endpoint}/{name}")
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.hub.endpoint}/{name}"}

    def info(self, body, name, revision=None):
        repo = self._repo(name)
        files = [{"rfilename": path, "size": len(content)} for path, (_, content) in repo.files.items()]
        return {"id": name, "sha": repo.sha, "private": repo.private, "siblings": files, "tags": [], "downloads": 0}

    def tree(self, body, name, revision):
        made = []
        for path, (oid, content) in self._repo(name).files.items():
            lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if len(oid) == 64 else {}
            made.append({"type": "file", "path": path, "size": len(content), "oid": oid[:40], **lfs})
        return made

    def resolve(self, body, name, revision, path):
        repo = self._repo(name)
        if path not in repo.files:
            raise Refused(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
        oid, content = repo.files[path]
        return 200, content, {"ETag": f'"{oid}"', "X-Repo-Commit": repo.sha}

    def validate(self, body):
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            fields = yaml.safe_load(found[1]) if found else {}
            problem = "" if isinstance(fields, dict) else "not an object"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            raise Refused(400, "Invalid metadata", errors=[{"message": problem}], warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, body, name, revision):
        repo, made = self._repo(name, write=True), []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            oid = repo.files.get(file["path"], (None, b""))[0]
            made.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": made}

    def batch(self, body, name):
        self._repo(name, write=True)
        return {"transfer": "basic", "objects": [self._action(thing) for thing in json.loads(body)["objects"]]}

    def _action(self, thing: dict) -> dict:
        oid, size = thing["oid"], thing["size"]
        if self.hub.largest and size > self.hub.largest:
            return {**thing, "error": {"code": 422, "message": f"File is too large: {size} > {self.hub.largest}"}}
        if oid in self.hub.storage:
            return thing
        upload = {"href": f"{self.hub.endpoint}/storage/{oid}?signature=s", "header": {}}
        if step := self.hub.part_bytes:
            parts = {f"{i + 1:05d}": f"{self.hub.endpoint}/part/{oid}/{i + 1}" for i in range(-(-size // step))}
            upload = {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(step), **parts}}
        return {**thing, "actions": {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/verify"}}}

    def store(self, body, oid):
        if "Authorization" in self.headers:
            raise Refused(400, "a token has no business at the storage")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the hash does not hold")
        self.hub.storage[oid] = body
        self.hub.stored.append(oid)
        return {}

    def part(self, body, oid, number):
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def complete(self, body, oid):
        parts = self.hub.parts[oid]
        for part in json.loads(body)["parts"]:
            if part["etag"].strip('"') != hashlib.md5(parts[part["partNumber"]]).hexdigest():
                raise Refused(400, "a part is another one")
        return self.store(b"".join(parts[number] for number in sorted(parts)), oid)

    def verify(self, body):
        self._account(write=True)
        asked = json.loads(body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "not there")
        return {}

    def commit(self, body, name, revision):
        repo = self._repo(name, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        made = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refused(400, f"{value['path']}: its content was never sent")
                made[value["path"]] = (value["oid"], self.hub.storage[value["oid"]])
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                made[value["path"]] = (hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)
            else:
                raise Refused(400, f"{line['key']} is none of what is expected")
        repo.files |= made
        repo.commits.append(lines[0]["value"]["summary"])
        return {"success": True, "commitOid": repo.sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{repo.sha}"}


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("HEAD GET", r"/?", Handler.root),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/storage/([0-9a-f]{64})", Handler.store),
    ("PUT", r"/part/([0-9a-f]{64})/(\d+)", Handler.part),
    ("POST", r"/complete/([0-9a-f]{64})", Handler.complete),
    ("POST", r"/verify", Handler.verify),
    ("HEAD GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
