"""What every forked process has imported already: all that a command, a server or a retrain may need."""

import prerank.cli.app
import prerank.evaluate.judge
import prerank.evaluate.report
import prerank.lifecycle.retrain
import prerank.serve.http
import prerank.serve.index_flight
import prerank.serve.replaying  # noqa: F401
