"""Asks Dynamo's workers what their caches hold, the way a router would.

    python tree_dump.py file DIRECTORY | etcd HTTP_URL

Prints one JSON object: {"WORKER/RANK": [sequence hash, ...], ...}. Written
against the wire format alone, so that what Warmpath believes is compared with
something that shares no code with it. Needs msgspec, which Dynamo brings.
"""

import base64
import json
import pathlib
import socket
import struct
import sys
import urllib.request
import uuid

import msgspec

WITHIN_S = 5.0


def sources_in_files(directory):
    folder = pathlib.Path(directory) / "v1" / "event_sources"
    files = folder.iterdir() if folder.is_dir() else []
    return [json.loads(it.read_text()) for it in files if not it.name.startswith(".tmp_")]


def sources_in_etcd(url):
    prefix = b"v1/event_sources/"
    end = prefix[:-1] + bytes([prefix[-1] + 1])
    body = {"key": base64.b64encode(prefix).decode(), "range_end": base64.b64encode(end).decode()}
    request = urllib.request.Request(f"{url}/v3/kv/range", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        kvs = json.load(response).get("kvs", [])
    return [json.loads(base64.b64decode(kv["value"])) for kv in kvs]


def read_exactly(connection, count):
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the connection ended early")
        data += part
    return data


def read_two_part(connection):
    header_len, body_len, _checksum = struct.unpack(">QQQ", read_exactly(connection, 24))
    return read_exactly(connection, header_len), read_exactly(connection, body_len)


def dump(metadata):
    """Every event of one source's tree dump."""
    target = metadata["recovery_target"]["transport"]["tcp"]
    address, path = target.split("/", 1)
    host, port = address.rsplit(":", 1)
    request_id = str(uuid.uuid4())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WITHIN_S)
        info = {"address": "127.0.0.1:%d" % listener.getsockname()[1], "subject": str(uuid.uuid4()),
                "context": request_id, "stream_type": "response"}
        header = json.dumps({
            "id": request_id, "request_type": "single_in", "response_type": "many_out",
            "payload_codec": "msgpack",
            "connection_info": {"transport": "tcp_server", "info": json.dumps(info)},
        }).encode()
        body = msgspec.msgpack.encode({
            "worker_id": metadata["worker"]["worker_id"], "dp_rank": metadata["worker"]["dp_rank"],
            "start_event_id": None, "end_event_id": None, "supports_tree_dump_failed": True,
            "kind": "recovery",
        })
        payload = struct.pack(">QQQ", len(header), len(body), 0) + header + body
        headers = json.dumps({"request-id": request_id, "x-endpoint-path": path}).encode()
        with socket.create_connection((host, int(port)), timeout=WITHIN_S) as out:
            out.sendall(struct.pack(">H", len(path)) + path.encode()
                        + struct.pack(">H", len(headers)) + headers
                        + struct.pack(">I", len(payload)) + payload)
            read_exactly(out, 4)
            back, _ = listener.accept()
            with back:
                back.settimeout(WITHIN_S)
                while True:
                    _, body = read_two_part(back)
                    item = msgspec.msgpack.decode(body) if body else {}
                    if "data" in item:
                        # A worker that holds nothing may answer with events.
                        (answer,) = item["data"].values()
                        return answer["events"]


def held(events):
    blocks = set()
    for event in events:
        if event.get("storage_tier", "device") != "device":
            continue
        data = event["event"]["data"]
        if data == "cleared":
            blocks.clear()
        elif "stored" in data:
            blocks.update(block["block_hash"] for block in data["stored"]["blocks"])
        else:
            blocks.difference_update(data["removed"]["block_hashes"])
    return sorted(blocks)


def main():
    kind, place = sys.argv[1:]
    sources = sources_in_files(place) if kind == "file" else sources_in_etcd(place)
    answer = {}
    for source in sources:
        worker = source["metadata"]["worker"]
        answer[f"{worker['worker_id']}/{worker['dp_rank']}"] = held(dump(source["metadata"]))
    print(json.dumps(answer))


main()
