//! Who owns a task, and what its failure means. Every task of both programs is one of two kinds, and clippy denies any
//! other way to start one:
//!
//! - [`TaskSet`]: one task among many, for a connection or a stream. A panic ends that one only, and is counted.
//! - [`Vital`]: without it the process is of no use, such as the accept loop of a listener. If it panics, or ends before
//!   it may, the process is not ready any more, drains, and fails. Whoever starts it anew helps; going on does not.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
};

use futures_util::FutureExt;
use prometheus_client::metrics::counter::Counter;
#[allow(clippy::disallowed_types, reason = "the owner of tasks")]
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Tasks of one sort, each of which may fail without the others. Dropping the set ends them.
#[derive(Debug)]
pub struct TaskSet {
    /// What each does, for the log.
    what: &'static str,
    panics: Counter,
    #[allow(clippy::disallowed_types, reason = "the owner of tasks")]
    set: JoinSet<()>,
}

impl TaskSet {
    /// An empty set. `what` says in the log what each task does; `panics` counts those that panic.
    pub fn new(what: &'static str, panics: &Counter) -> Self {
        #[allow(clippy::disallowed_types, reason = "the owner of tasks")]
        let set = JoinSet::new();
        Self { what, panics: panics.clone(), set }
    }

    /// Starts a task. The handle can end it, which is no failure.
    #[allow(clippy::must_use_candidate, reason = "most tasks end by themselves")]
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.set.spawn(task)
    }

    /// How many there are, those among them that have ended and were not asked for.
    pub fn len(&self) -> usize {
        self.set.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty()
    }

    /// Waits until the next one ends; `None` if there is none. Cancel-safe.
    pub async fn next_ended(&mut self) -> Option<()> {
        let ended = self.set.join_next().await?;
        self.note(ended);
        Some(())
    }

    /// Forgets those that have ended.
    pub fn reap(&mut self) {
        while let Some(ended) = self.set.try_join_next() {
            self.note(ended);
        }
    }

    /// Waits until all have ended. Cancel-safe.
    pub async fn all_ended(&mut self) {
        while self.next_ended().await.is_some() {}
    }

    /// Drops all that still run, and waits until they are gone.
    pub async fn shutdown(&mut self) {
        self.set.abort_all();
        self.all_ended().await;
    }

    fn note(&self, ended: Result<(), JoinError>) {
        let Err(failure) = ended else { return };
        if let Ok(payload) = failure.try_into_panic() {
            self.panics.inc();
            let cause = text_of(payload.as_ref());
            error!(
                what = self.what,
                cause, "a task panicked, and ended alone: this is a defect, please report it"
            );
        }
    }
}

/// A task that a process cannot do without has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("task {what:?} {how}: this is a defect, please report it")]
pub struct Failure {
    what: &'static str,
    how: String,
}

/// Watches the tasks that something cannot do without. Clones watch together.
#[derive(Clone, Debug, Default)]
pub struct Vital(Arc<State>);

#[derive(Debug, Default)]
struct State {
    failed: CancellationToken,
    first: OnceLock<Failure>,
}

impl Vital {
    /// Runs `task`, in the place of the caller. If it panics, or ends although `may_end` is not cancelled, that is the
    /// failure of all that is watched here. Dropping the future ends the task, which is no failure.
    pub async fn watch(
        &self,
        what: &'static str,
        may_end: &CancellationToken,
        task: impl Future<Output = ()>,
    ) {
        let how = match AssertUnwindSafe(task).catch_unwind().await {
            Ok(()) if may_end.is_cancelled() => return,
            Ok(()) => "has ended".to_owned(),
            Err(payload) => format!("panicked: {}", text_of(payload.as_ref())),
        };
        let failure = Failure { what, how };
        error!(cause = %failure, "this process cannot go on, and leaves");
        let _ = self.0.first.set(failure);
        self.0.failed.cancel();
    }

    /// Waits until a task has failed. Cancel-safe.
    pub async fn failed(&self) {
        self.0.failed.cancelled().await;
    }

    /// Whether all is well; otherwise what has failed first.
    pub fn check(&self) -> Result<(), Failure> {
        self.0.first.get().map_or(Ok(()), |failure| Err(failure.clone()))
    }
}

/// What a panic says.
pub(super) fn text_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_panic_ends_one_task_and_is_counted() {
        let panics = Counter::default();
        let mut tasks = TaskSet::new("test", &panics);
        let (done, survivor) = (CancellationToken::new(), CancellationToken::new());
        tasks.spawn(async { panic!("on purpose") });
        let (end, told) = (survivor.clone(), done.clone());
        tasks.spawn(async move {
            end.cancelled().await;
            told.cancel();
        });
        assert_eq!(tasks.next_ended().await, Some(()));
        assert_eq!((panics.get(), tasks.len(), tasks.is_empty()), (1, 1, false));
        survivor.cancel();
        done.cancelled().await;
        tasks.spawn(async { panic!("{}", "again") });
        sleep(Duration::from_secs(1)).await;
        tasks.reap();
        assert_eq!((panics.get(), tasks.is_empty()), (2, true));
        assert_eq!(tasks.next_ended().await, None);
        // What is ended from outside has not panicked.
        tasks.spawn(std::future::pending());
        tasks.shutdown().await;
        assert_eq!((panics.get(), tasks.is_empty()), (2, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_is_needed_may_neither_panic_nor_end_too_soon() {
        let (may_end, vital) = (CancellationToken::new(), Vital::default());
        vital.watch("the second", &may_end, async { panic!("{} on purpose", 2) }).await;
        vital.watch("the third", &may_end, async {}).await;
        vital.failed().await;
        let failure = vital.check().unwrap_err();
        assert_eq!(
            failure.to_string(),
            "task \"the second\" panicked: 2 on purpose: this is a defect, please report it"
        );

        let vital = Vital::default();
        let clone = vital.clone();
        vital.watch("the first", &may_end, async {}).await;
        assert!(clone.check().unwrap_err().to_string().starts_with("task \"the first\" has ended: "));

        let vital = Vital::default();
        may_end.cancel();
        vital.watch("the last", &may_end, async {}).await;
        let never = CancellationToken::new();
        let dropped = vital.watch("what is dropped", &never, std::future::pending());
        assert!(timeout(Duration::from_secs(1), dropped).await.is_err());
        assert_eq!(vital.check(), Ok(()));
        assert!(timeout(Duration::from_secs(1), vital.failed()).await.is_err());
    }

    #[test]
    fn a_panic_without_a_text_has_one() {
        assert_eq!(text_of(&7), "no text");
    }
}
