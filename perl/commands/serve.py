"""`serve`: a run's roles behind OpenAI's API, to try them out."""

from perl.commands.options import Host, Port, Run
from perl.system.progress import console


def serve(run: Run, port: Port = 8000, host: Host = "127.0.0.1") -> None:
    """Serve a run's base, SFT model, policy and reward model with OpenAI's API, to try them out."""
    from perl.library import load_run
    from perl.server import listen

    listen.require_server("serve")
    from perl.server.guard import Guard
    from perl.server.openai import openai_app

    with listen.open_port(host, port) as listening:
        loaded = load_run(run)
        print(f"{listen.address_of(listening)}/v1", flush=True)
        console.print(
            "To try things out, one request at a time; for production use vLLM (docs/serving.md). Ctrl-C stops it."
        )
        listen.serve(Guard(openai_app(loaded), any_host=not listen.is_loopback(listening)), listening)
