#!/usr/bin/env python3
"""A Dynamo worker in front of one simulated engine, for `make bench-quality`.

Dynamo's frontend speaks to Dynamo's workers only. This one forwards tokens to the
engine over HTTP, and has Dynamo's own publisher relay the engine's KV events, so
that the frontend's router chooses among the very engines that all others get.

    dynamo_worker.py MODEL_DIR MODEL_NAME HTTP_PORT EVENTS_PORT BLOCK_SIZE BLOCKS STEP_TOKENS
"""

import asyncio
import json
import os
import sys

import aiohttp
import uvloop
from dynamo.llm import (
    KvEventPublisher,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_model,
)
from dynamo.runtime import DistributedRuntime

# Longest line of the engine's stream, in bytes.
LINE_BYTES = 1 << 16


class Forwarder:
    """Answers Dynamo's requests with the engine's tokens."""

    def __init__(self, session, url, model):
        self.session = session
        self.url = url
        self.model = model

    async def generate(self, request, context):
        """Yields tokens as they come, and the engine's usage with the last."""
        body = {
            "model": self.model,
            "prompt": request["token_ids"],
            "max_tokens": request["stop_conditions"]["max_tokens"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        async with self.session.post(self.url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"the engine answers {response.status}")
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                message = json.loads(line[len(b"data: ") :])
                if message.get("usage"):
                    yield {
                        "token_ids": [],
                        "finish_reason": "length",
                        "completion_usage": message["usage"],
                    }
                    return
                tokens = message["choices"][0].get("token_ids")
                if tokens:
                    yield {"token_ids": tokens}


async def main():
    model_dir, model, http, events, block_size, blocks, step_tokens = sys.argv[1:]
    runtime = DistributedRuntime(
        asyncio.get_running_loop(),
        os.environ["DYN_DISCOVERY_BACKEND"],
        os.environ["DYN_REQUEST_PLANE"],
        event_plane=os.environ["DYN_EVENT_PLANE"],
    )
    endpoint = runtime.endpoint("dynamo.backend.generate")
    config = ModelRuntimeConfig()
    config.total_kv_blocks = int(blocks)
    config.max_num_batched_tokens = int(step_tokens)
    config.max_num_seqs = 256
    publisher = KvEventPublisher(
        endpoint=endpoint,
        kv_block_size=int(block_size),
        zmq_endpoint=f"tcp://127.0.0.1:{events}",
        zmq_topic="",
        enable_local_indexer=True,
    )
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        model_dir,
        model,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=int(block_size),
        runtime_config=config,
        ignore_weights=True,
    )
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=LINE_BYTES
    ) as session:
        forwarder = Forwarder(session, f"http://127.0.0.1:{http}/v1/completions", model)
        await endpoint.serve_endpoint(forwarder.generate, graceful_shutdown=False)
    del publisher


uvloop.install()
asyncio.run(main())
