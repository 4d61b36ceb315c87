//! Logs: one line per event on standard error, for people or for machines. A log that cannot be written neither stops
//! nor ends the process (`queue`), and nothing that stands in a line breaks it (`format`).

mod format;
pub mod limit;
mod queue;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    io::{self, IsTerminal},
    panic::{self, PanicHookInfo},
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tracing::{error, level_filters::LevelFilter};
use tracing_subscriber::{EnvFilter, fmt, util::SubscriberInitExt};

pub use self::format::one_line;
use self::{
    format::{Json, TextFields},
    queue::Queue,
};
use super::settings::{Parse, not_expected};

/// Lines that wait for standard error, in bytes: some seconds of a busy gateway's.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// How long the last lines may take at the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

crate::settings_group! {
    /// Log (what goes to standard error)
    pub struct LogSettings in "log" {
        /// How a line looks: text for people, json for machines (one object per line).
        format: LogFormat = "text",
        /// What is logged: error, warn, info, debug or trace, or several directives such as
        /// `info,tunnel_core=debug` (the syntax of tracing's `EnvFilter`).
        level: LogFilter = "info",
    }
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Parse for LogFormat {
    const PLACEHOLDER: &'static str = "FORMAT";
    const EXPECTED: &'static str = "a log format: use text or json";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(not_expected::<Self>(text)),
        }
    }
}

/// What is logged: directives that are known to be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

impl Parse for LogFilter {
    const PLACEHOLDER: &'static str = "DIRECTIVES";
    const EXPECTED: &'static str =
        "a log level (error, warn, info, debug, trace, off) or a list of module=level";

    fn parse(text: &str) -> Result<Self, String> {
        // A bare word is a level here: EnvFilter would take "inof" for the name of a module, and "" for a level.
        let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
        let is_directive = |word: &str| word.contains(['=', '[']) || is_level(word.trim());
        let valid = text.split(',').all(is_directive) && EnvFilter::try_new(text).is_ok();
        if valid { Ok(Self(text.to_owned())) } else { Err(not_expected::<Self>(text)) }
    }
}

/// What [`init`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// How a line looks.
    pub format: LogFormat,
    /// What is logged.
    pub filter: LogFilter,
}

impl From<LogSettings> for LogConfig {
    fn from(settings: LogSettings) -> Self {
        Self { format: settings.format.value, filter: settings.level.value }
    }
}

/// Logs cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The directives are wrong after all.
    #[error("the log level cannot be used: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Somebody was faster.
    #[error("logs are already set up in this process: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// The system gives no thread.
    #[error("the log's thread cannot be started: {0}")]
    Thread(#[from] io::Error),
}

/// The log of this process. Dropping it waits for the last lines to be written, but not for long.
#[derive(Debug)]
#[must_use = "the last lines are lost without it"]
pub struct Log(Queue);

impl Log {
    /// Registers the count of lines that were lost.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "log_lines_dropped",
            "Lines that are missing in the log, since standard error was too slow or did not take them",
            self.0.dropped().clone(),
        );
    }

    /// Cancelled if nobody writes the log any more, which is a defect.
    pub fn ended(&self) -> CancellationToken {
        self.0.ended()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(LAST_LINES);
    }
}

/// Sends the events of this process to standard error, and its panics too. Once per process.
pub fn init(config: &LogConfig) -> Result<Log, LogError> {
    let filter = EnvFilter::try_new(&config.filter.0)?;
    let queue = Queue::start(io::stderr(), MAX_WAITING)?;
    // The subscriber would complain on standard error, which may be what is broken.
    let builder =
        fmt().with_env_filter(filter).with_writer(queue.clone()).log_internal_errors(false).with_ansi(false);
    match config.format {
        LogFormat::Text => {
            // https://no-color.org: set and not empty, whatever it says.
            let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let ansi = io::stderr().is_terminal() && !no_color;
            builder.fmt_fields(TextFields).with_ansi(ansi).finish().try_init()?;
        }
        LogFormat::Json => builder.event_format(Json).finish().try_init()?,
    }
    panic::set_hook(Box::new(log_panic));
    Ok(Log(queue))
}

/// Says where a panic was. Its task's owner says what became of it.
fn log_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let cause = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
    let location = info.location().map(ToString::to_string);
    // If the environment asks for one.
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    error!(location, cause, backtrace, "panic: this is a defect, please report it");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_known_from_slips() {
        for text in [
            "info",
            "off",
            "DEBUG",
            "info,tunnel_core=debug",
            "tunnel_core::link=trace",
            "[link{node=a}]=debug",
        ] {
            assert!(LogFilter::parse(text).is_ok(), "{text}");
        }
        for text in ["", "inof", "info,debgu", "tunnel_core=loud", "info,"] {
            assert!(LogFilter::parse(text).is_err(), "{text}");
        }
    }
}
