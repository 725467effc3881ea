"""The loop of one stage: take micro-batches, step the host, log, evaluate, save."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from engine.disk.checkpoint import SavedLayout, TrainerState
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.disk.rollback import Rollback
from engine.disk.run_folder import StageFolder
from engine.hosts import Host, expert_parallel_size
from engine.plan.plan import Plan, StagePlan
from engine.processes import ranks
from engine.run.assessment import Assessment
from engine.run.curve import Curve
from engine.run.resumption import Found, go_back, resume
from engine.step.compiled import compile_blocks
from engine.step.guard import Guard, culprits
from engine.step.loss_window import LossWindow
from engine.step.report import StepResult
from engine.telemetry.metrics import MetricsLog
from engine.telemetry.progress import Progress
from engine.telemetry.throughput import Throughput
from engine.watch.heartbeat import Activity, Heartbeat
from engine.watch.stop import StopRequest, shielded_children
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.data.batch import Batch
from omnivl.data.config import entry_keys
from omnivl.data.loader import Loader, LoaderState
from omnivl.data.tokenizer import Tokenizer, batch_readers
from omnivl.randomness import stable_hash

_WRITING = "a checkpoint is being written"


class StageLoop:
    """One stage on one process. Every process of the run goes through the same steps."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        folder: StageFolder,
        host: Host,
        tokenizer: Tokenizer,
        throughput: Throughput,
        progress: Progress,
        stop: StopRequest,
        heartbeat: Heartbeat,
        found: Found,
    ) -> None:
        """Prepares the loop; ``run`` goes through it.

        Args:
            plan: The whole plan.
            index: Which stage.
            folder: The folder into which it writes.
            host: Holds the chain.
            tokenizer: Turns texts into ids.
            throughput: Measures speed.
            progress: Displays the progress.
            stop: Tells when to end early.
            heartbeat: Is notified of what the loop begins.
            found: Where the stage goes on.
        """
        self._plan, self._index, self._folder, self._host = plan, index, folder, host
        self._stage: StagePlan = plan.stages[index]
        self._tokenizer, self._throughput, self._progress, self._stop = tokenizer, throughput, progress, stop
        self._heartbeat, self._found = heartbeat, found
        parallel = self._stage.parallel
        processes = ranks.world_size()
        layout = SavedLayout(
            parallel.host,
            None if parallel.host == "plain" else parallel.zero_stage,
            processes,
            expert_parallel_size(parallel, host.chain),
            self._stage.samples_per_step(processes),
            parallel.pipeline_stages if parallel.host == "pipeline" else 1,
        )
        self._first = ranks.rank() == 0
        # Step and best score are kept up to date; the states of guard, window and log are added when it is saved.
        self._state = TrainerState(layout=layout)
        self._guard, self._window = Guard(plan.guard), LossWindow()
        self._rollbacks: tuple[Rollback, ...] = ()
        self._assessment = Assessment(host, self._stage, tokenizer, folder, plan.checkpoint, plan.loader.decode)
        self._curve = Curve(host, self._stage, tokenizer, folder, progress, plan.loader.decode)
        self._metrics: MetricsLog | None = None
        self._checkpoints = CheckpointWriter(
            folder.checkpoints, asynchronous=plan.checkpoint.asynchronous, keep_last=plan.checkpoint.keep_last
        )

    def run(self, complete: Callable[[], None]) -> int:
        """Goes on from the newest whole checkpoint, if there is one, to the end of the stage.

        Args:
            complete: Writes the weights; called by every process when the last step is saved, before the evaluation.

        Returns:
            0 where the stage was finished, or the number of the signal that ended it early.

        Raises:
            RolledBackError: The stage returns to a checkpoint, and has to be started again from there.
            UnevaluatedError: An evaluation failed; the stage has to be started again from its newest checkpoint.
            DivergedError: It would have to return to a checkpoint, but the plan allows no more rollbacks.
            DataError: The data is missing or too bad.
            CheckpointError: The newest checkpoint does not fit the model.
        """
        loader_state, pending = self._resume()
        stage, begin = self._stage, self._state.step
        self._progress.begin_stage(self._index, stage.name, stage.steps, begin)
        with ExitStack() as stack:
            if self._first:
                tensorboard = self._folder.tensorboard if self._plan.logging.tensorboard else None
                log = MetricsLog(
                    self._folder.metrics,
                    tensorboard,
                    keep_bytes=self._state.metrics_bytes,
                    step=begin,
                    steps_before=sum(earlier.steps for earlier in self._plan.stages[: self._index]),
                )
                self._metrics = stack.enter_context(log)
                for rollback in pending:
                    facts = {"first_bad": rollback.first_bad, "step": rollback.step}
                    log.write(begin, "rollback", reason=rollback.reason, rollback=facts)
            stack.callback(self._curve.close)
            self._curve.begin(begin)
            loader = stack.enter_context(self._open_loader(loader_state))
            batches = _started(loader) if self._host.takes_batches else loader.places()
            if begin == stage.steps:
                complete()
            self._catch_up()
            if ranks.from_first(any(self._curve.votes(begin).values()), bool):
                self._draw_curve()
            self._throughput.restart()
            while self._state.step < stage.steps:
                loader_state, votes = self._take_step(loader, batches, first=self._state.step == begin)
                signal = self._stop.agreed(votes)
                self._finish_step(loader_state, complete, votes, stopping=signal != 0)
                if signal and self._state.step < stage.steps:
                    return signal
        return 0

    def _take_step(
        self, loader: Loader, batches: Iterator[tuple[Batch | None, LoaderState]], *, first: bool
    ) -> tuple[LoaderState, Collection[str]]:
        """One optimizer step: data, host, guard, display. Returns the position in the data after it, and the votes."""
        before = time.perf_counter()
        self._begin("loading data")
        taken = [next(batches) for _ in range(self._stage.batch.gradient_accumulation_steps)]
        waited = time.perf_counter() - before
        micro_batches = [batch for batch, _ in taken if batch is not None]
        self._begin("first step" if first else "step")
        result = self._host.step(micro_batches, self._state.step, self._votes)
        if first and self._stage.parallel.compile:
            compile_blocks(self._host.chain)  # after the step in which a host learns how parameters are used
        step = self._state.step + 1
        self._state = replace(self._state, step=step)
        self._throughput.add(micro_batches, waited)
        trouble = self._guard.judge(step, {loader.kind_before(after) for _, after in taken}, result)
        if result.skipped:
            what, count = culprits(result), self._guard.skipped
            self._progress.message(f"step {step}: {what} not finite, step skipped ({count} so far)")
        if trouble is not None:
            self._checkpoints.finish()
            go_back(self._stage, self._folder, self._plan.guard, self._rollbacks, trouble, step, taken[-1][1])
        self._window.add(result)
        speed = self._throughput.samples_per_second()
        self._progress.update(step, result.losses, speed, result.learning_rates)
        if first and micro_batches and self._metrics is not None:
            self._metrics.show_samples(step, micro_batches[0])
        if step % self._plan.logging.every == 0 or step == self._stage.steps:
            self._write_line(result)
        self._curve.train(time.perf_counter() - before)
        return taken[-1][1], result.votes

    def _votes(self) -> dict[str, bool]:
        """What the processes have to agree on at the end of a step: they count it with the step's scalars."""
        own = {_WRITING: self._checkpoints.is_writing, **self._curve.votes(self._state.step + 1)}
        return own | self._stop.votes()

    def _begin(self, activity: Activity) -> None:
        self._heartbeat.begin(activity, self._stage.name, self._state.step)

    def _write_line(self, result: StepResult) -> None:
        means = self._window.take()
        if self._metrics is not None:
            self._metrics.write(
                self._state.step,
                "train",
                **means,
                lr=dict(result.learning_rates),
                skipped=self._guard.skipped,
                speed=self._throughput.figures(self._host.device),
            )
        self._throughput.restart()

    def _finish_step(
        self, loader_state: LoaderState, complete: Callable[[], None], votes: Collection[str], *, stopping: bool
    ) -> None:
        """Saves and evaluates in the steps in which they are due: first what is not to be lost, then what may fail."""
        before = time.perf_counter()
        step, last = self._state.step, self._state.step == self._stage.steps
        due = self._assessment.is_due(step)
        self._state = replace(self._state, evaluation_due=due)
        saves = last or stopping or step % self._plan.checkpoint.every == 0
        if saves:
            self._save(loader_state)
        else:
            self._checkpoints.poll(_WRITING in votes)
        if saves and (last or stopping or due):
            self._checkpoints.finish()
        saving = time.perf_counter() - before
        if last:
            complete()
        if self._curve.is_due(votes) and (last or not stopping):
            self._draw_curve()
        if due and (last or not stopping):  # who stops a run waits for a step, not for an evaluation
            best = self._evaluate()
            began = time.perf_counter()
            if best and saves:
                self._checkpoints.prune(self._state.best_step)
            elif best:
                self._save(loader_state)
            saving += time.perf_counter() - began
        self._throughput.pause(time.perf_counter() - before, saving=saving)

    def _catch_up(self) -> None:
        """Evaluates at the resumed checkpoint where that was still to come."""
        state = self._state
        if not state.evaluation_due:
            return
        if not self._assessment.is_due(state.step):  # it failed, or this start's plan asks for none
            self._state = replace(state, evaluation_due=False)
        elif self._evaluate() and not self._guard.in_trouble:
            self._checkpoints.prune(self._state.best_step)

    def _draw_curve(self) -> None:
        """Evaluates by time, as it is time."""
        self._begin("evaluating")
        self._curve.evaluate(self._state.step, self._metrics, f"curve-{self._heartbeat.doing.number}")

    def _evaluate(self) -> bool:
        """Returns whether this is the best state so far."""
        state = self._state
        self._begin("evaluating")
        self._progress.message(f"step {state.step}: evaluating")
        key = f"evaluation-{self._heartbeat.doing.number}"
        figure = self._assessment.run(state.step, self._metrics, state.best, key)
        self._state = state.evaluated(figure, self._assessment.best_of)
        return figure is not None

    def _save(self, loader_state: LoaderState) -> None:
        self._begin("saving")
        state = replace(
            self._state,
            skipped=self._guard.skipped,
            skipped_in_a_row=self._guard.skipped_in_a_row,
            metrics_bytes=0 if self._metrics is None else self._metrics.size,
            window=self._window.state(),
            guard=self._guard.state(),
            rollbacks=len(self._rollbacks),
        )
        # While steps are bad, older checkpoints are kept: the stage may have to return to one of them.
        self._checkpoints.save(self._host, state, loader_state.to_json(), prunes=not self._guard.in_trouble)

    def _resume(self) -> tuple[LoaderState | None, Sequence[Rollback]]:
        """Restores the checkpoint that was found, if there is one.

        Returns:
            The position in the data, and the rollbacks that have returned to this checkpoint.
        """
        layout, tell = self._state.layout, self._progress.message
        restored = resume(self._found, self._folder, self._host, layout, self._assessment, tell)
        state = self._state = restored.state
        self._rollbacks = restored.rollbacks
        self._guard = Guard(self._plan.guard, state.skipped, state.skipped_in_a_row, state.guard)
        self._window = LossWindow(state.window)
        return restored.position, restored.pending

    def _open_loader(self, state: LoaderState | None) -> Loader:
        entries, objectives = self._stage.data, self._stage.objectives
        sizes, seed = self._stage.model.inputs, stable_hash(self._plan.seed, "data", self._index)
        readers = batch_readers(self._stage.model.text_inputs, self._tokenizer, sizes.text_length)
        keyed = zip(entry_keys(entries), entries, strict=True)
        asked = {key: asked_fields(objectives, entry.kind, key) for key, entry in keyed}
        compiled = self._stage.parallel.compile  # for shapes that change, blocks would be compiled anew
        return Loader(
            entries,
            loader_config=self._plan.loader,
            sizes=sizes,
            tokenizer=self._tokenizer,
            prepare=Preparation(objectives, self._tokenizer.special, sizes, seed, readers),
            asked=asked,
            micro_batch_size=self._stage.batch.micro_batch_size_per_gpu,
            gradient_accumulation_steps=self._stage.batch.gradient_accumulation_steps,
            seed=seed,
            replica=self._host.gather.replica,
            replicas=self._host.gather.replicas,
            state=state,
            quarantine_log=self._folder.quarantine,
            trims=not compiled and not any(objective.needs_whole_texts for objective in objectives),
        )


def _started(loader: Loader) -> Iterator[tuple[Batch | None, LoaderState]]:
    """The loader's batches. Its workers start when the first one is asked for."""
    batches = iter(loader)
    with shielded_children():
        first = next(batches)
    yield first
    yield from batches
