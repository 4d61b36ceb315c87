//! Logs: one line per event on standard error, for people or for machines.

use std::{
    env,
    io::{self, IsTerminal},
};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{EnvFilter, fmt, util::SubscriberInitExt};

use super::settings::{Parse, not_expected};

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
}

/// Sends the events of this process to standard error. Once per process.
pub fn init(config: &LogConfig) -> Result<(), LogError> {
    let builder = fmt().with_env_filter(EnvFilter::try_new(&config.filter.0)?).with_writer(io::stderr);
    match config.format {
        LogFormat::Text => {
            // https://no-color.org: set and not empty, whatever it says.
            let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            builder.with_ansi(io::stderr().is_terminal() && !no_color).finish().try_init()?;
        }
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).finish().try_init()?,
    }
    Ok(())
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
