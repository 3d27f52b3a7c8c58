"""Flower ServerApp: run a fedllm recipe's rounds."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm.federation.server import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run that the run config describes."""
    serve(context.run_config, grid)
