//! The frame in which either program runs: the log, the signals, the admin endpoint, what the service manager is told,
//! the wait for credentials, and an end that nothing can hold up. Each program gives to [`run`] what it does within.

use std::{
    fmt::Display,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{
    runtime,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    accept, admin,
    log::{self, Log, LogConfig, LogError},
    notify::Notifier,
    signal::Signals,
    tasks::{Failure, TaskSet, Vital},
};

/// How often files that are not there yet are looked for.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// How often the service manager is told how it goes, if that has changed.
const STATUS_PERIOD: Duration = Duration::from_secs(5);
/// What the end of a process takes beyond its drain.
const LAST_STEPS: Duration = Duration::from_secs(15);

/// What a program is called, and how its process is set up.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What the names of its metrics begin with.
    pub metrics: &'static str,
    /// Its log.
    pub log: LogConfig,
    /// How long its drain takes at most.
    pub drain: Duration,
}

/// Why a process does not start, whatever its program does.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Logs cannot be set up.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The runtime or the signals are not to be had.
    #[error("the process cannot be set up: {0}")]
    Setup(#[from] io::Error),
}

/// The admin endpoint cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("admin.listen: cannot listen on {address}: {error}")]
pub struct AdminError {
    address: SocketAddr,
    error: io::Error,
}

/// The process around a running program.
#[derive(Debug)]
pub struct Process<'a> {
    /// Cancelled when the program shall end, in good order.
    pub drain: CancellationToken,
    frame: &'a Frame,
    log: &'a Log,
    notifier: Arc<Notifier>,
    vital: Vital,
    /// What is waited for, until the program works.
    awaited: Arc<Mutex<Option<String>>>,
    /// Ends the tasks: probes are answered until the drain has ended.
    ended: CancellationToken,
    tasks: TaskSet,
}

/// Whether a program does its work, or why not. For `/readyz`, and for the service manager.
type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Runs `program` until it has ended, which it does soon after its [`Process::drain`] is cancelled: by SIGTERM or SIGINT,
/// or because something failed that the process cannot do without, which makes the exit code a failure. A second signal
/// ends it at once; that is a failure too. What goes wrong once there is a log is in the log.
///
/// Blocks. Nothing that hangs keeps the process, neither a lookup of a name nor a reader of the log that has stalled.
pub fn run<E: Display>(
    frame: &Frame,
    runtime: &mut runtime::Builder,
    program: impl AsyncFnOnce(&mut Process<'_>) -> Result<Result<(), Failure>, E>,
) -> Result<ExitCode, FrameError> {
    let log = log::init(&frame.log)?;
    let runtime = runtime.enable_all().build()?;
    let code = runtime.block_on(supervise(frame, &log, program));
    // Whoever asked is gone. A lookup may take half a minute to fail, and a credential plugin hang for ever.
    runtime.shutdown_background();
    code
}

async fn supervise<E: Display>(
    frame: &Frame,
    log: &Log,
    program: impl AsyncFnOnce(&mut Process<'_>) -> Result<Result<(), Failure>, E>,
) -> Result<ExitCode, FrameError> {
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let signals = Signals::install()?;
    let mut process = Process::new(frame, log, drain.clone());
    let (vital, notifier) = (process.vital.clone(), process.notifier.clone());
    let watching = async {
        let (never, log_ended) = (CancellationToken::new(), log.ended());
        tokio::join!(
            // Whoever waits for the drain is told of it before the program, which may end at once.
            biased;
            vital.watch("signals", &stop, signals.run(drain.clone(), stop.clone())),
            vital.watch("log", &never, log_ended.cancelled()),
            async {
                vital.failed().await;
                drain.cancel();
            },
            async {
                drain.cancelled().await;
                notifier.stopping("draining", frame.drain + LAST_STEPS);
            }
        )
    };
    let code = tokio::select! {
        // A second signal means now, whatever else is done. What fails or is asked for is known before the program
        // goes on.
        biased;
        () = stop.cancelled() => {
            warn!("stopped before the drain was complete; streams that still ran were cut");
            ExitCode::FAILURE
        }
        _ = watching => ExitCode::FAILURE,
        ended = program(&mut process) => match ended {
            Ok(Ok(())) => ExitCode::SUCCESS,
            Ok(Err(_said)) => ExitCode::FAILURE,
            Err(cause) => {
                error!(%cause, "cannot run");
                ExitCode::FAILURE
            }
        },
    };
    process.end().await;
    Ok(if process.vital.check().is_ok() { code } else { ExitCode::FAILURE })
}

impl<'a> Process<'a> {
    fn new(frame: &'a Frame, log: &'a Log, drain: CancellationToken) -> Self {
        Self {
            drain,
            frame,
            log,
            notifier: Notifier::from_environment().into(),
            vital: Vital::default(),
            awaited: Arc::new(Mutex::new(Some("starting".to_owned()))),
            ended: CancellationToken::new(),
            tasks: TaskSet::new("a task of the process", &Counter::default()),
        }
    }

    /// Answers probes at `address`, if there is one, from now on until the end. `ready` is asked once the program works;
    /// `panics` counts connections that have panicked.
    /// Gives the address with the port that the system chose where 0 was asked for.
    pub fn serve_admin(
        &mut self,
        address: Option<SocketAddr>,
        mut registry: Registry,
        panics: Counter,
        ready: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Result<Option<SocketAddr>, AdminError> {
        self.log.register(registry.sub_registry_with_prefix(self.frame.metrics));
        let ready = self.judge(ready);
        self.tell_status(ready.clone());
        let Some(address) = address else { return Ok(None) };
        let opened = accept::listen(address).and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (bound, listener) = opened.map_err(|error| AdminError { address, error })?;
        let ended = self.ended.clone();
        self.spawn("admin", async move {
            admin::serve(listener, move || ready(), registry, &panics, ended).await;
        });
        Ok(Some(bound))
    }

    /// Waits until all `files` are there, then gives what `load` makes of them; `None` if the program shall end before.
    ///
    /// Files that are there but no good are an error at once. Those that have just come may be written still, one after
    /// the other: they are tried again, which the log says.
    pub async fn credentials<T, E: Display>(
        &self,
        files: &[PathBuf],
        mut load: impl FnMut() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let mut said = String::new();
        loop {
            let cause = match missing(files) {
                Some(path) => format!("waiting for {}, which does not exist yet", path.display()),
                None => match load() {
                    Ok(loaded) => return Ok(Some(loaded)),
                    Err(error) if said.is_empty() => return Err(error),
                    Err(error) => format!("waiting for credentials that can be used: {error}"),
                },
            };
            if cause != said {
                warn!("{cause}");
                self.notifier.ready(&cause);
                *self.awaited.lock() = Some(cause.clone());
                said = cause;
            }
            tokio::select! {
                // Nobody waits any more.
                biased;
                () = self.drain.cancelled() => {
                    info!("ended before there were credentials");
                    return Ok(None);
                }
                () = sleep(LOOK_PERIOD) => {}
            }
        }
    }

    /// The program works from now on.
    pub fn works(&self) {
        *self.awaited.lock() = None;
        self.notifier.ready("started");
    }

    fn judge(&self, ready: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Ready {
        let (vital, awaited) = (self.vital.clone(), self.awaited.clone());
        Arc::new(move || {
            vital.check().map_err(|failure| failure.to_string())?;
            match awaited.lock().clone() {
                Some(awaited) => Err(awaited),
                None => ready(),
            }
        })
    }

    /// Tells the service manager how it goes, until the drain.
    fn tell_status(&mut self, ready: Ready) {
        if !self.notifier.is_wanted() {
            return;
        }
        let (notifier, drain) = (self.notifier.clone(), self.drain.clone());
        let telling = async move {
            let mut period = interval(STATUS_PERIOD);
            period.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut told = String::new();
            loop {
                period.tick().await;
                let status = ready().map_or_else(|reason| reason, |()| "working".to_owned());
                if status != told {
                    notifier.status(&status);
                    told = status;
                }
            }
        };
        let task = async move { drain.run_until_cancelled(telling).await.unwrap_or_default() };
        let drain = self.drain.clone();
        self.spawn_until("status", drain, task);
    }

    fn spawn(&mut self, what: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_until(what, self.ended.clone(), task);
    }

    fn spawn_until(
        &mut self,
        what: &'static str,
        may_end: CancellationToken,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let vital = self.vital.clone();
        self.tasks.spawn(async move { vital.watch(what, &may_end, task).await });
    }

    /// Ends the tasks. None of them takes long.
    async fn end(&mut self) {
        self.drain.cancel();
        self.ended.cancel();
        self.tasks.all_ended().await;
    }
}

/// The first of the files that does not exist.
fn missing(files: &[PathBuf]) -> Option<&Path> {
    let is_missing =
        |path: &&PathBuf| fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    files.iter().find(is_missing).map(PathBuf::as_path)
}
