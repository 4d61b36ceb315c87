//! What is wrong with the settings: all of it at once, each with the place to go to.

use std::{
    fmt::{self, Display},
    ops::RangeInclusive,
    path::PathBuf,
};

use super::Value;

/// Where something was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the configuration file; both count from 1.
    File {
        /// Line.
        line: u64,
        /// Column.
        column: u64,
    },
    /// In the configuration file, as a whole.
    WholeFile,
    /// In a flag, named with its dashes.
    Flag(String),
    /// In an environment variable.
    Variable(String),
    /// Nowhere: it is the default.
    Default,
    /// Somewhere, but it could not be read, and a problem was noted for that.
    Unreadable,
}

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { line, .. } => write!(f, "line {line}"),
            Self::WholeFile => f.write_str("the configuration file"),
            Self::Flag(flag) => f.write_str(flag),
            Self::Variable(name) => f.write_str(name),
            Self::Default | Self::Unreadable => f.write_str("the default"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// The key that it is about; empty for the whole file.
    pub key: String,
    /// What, and what to do.
    pub text: String,
}

/// Everything that is wrong with the settings. As an error: one line for each, the file's first.
#[derive(Clone, Debug, Default)]
pub struct Problems {
    file: Option<PathBuf>,
    prefix: &'static str,
    found: Vec<Problem>,
}

impl Problems {
    /// None yet. `prefix` is that of environment variables.
    pub(super) fn new(prefix: &'static str, file: Option<PathBuf>) -> Self {
        Self { file, prefix, found: Vec::new() }
    }

    /// Notes one.
    pub fn add(&mut self, place: Place, key: impl Into<String>, text: impl Into<String>) {
        self.found.push(Problem { place, key: key.into(), text: text.into() });
    }

    /// Notes one about a value. Says nothing about a value that could not be read, since that has been said.
    pub fn at<T>(&mut self, value: &Value<T>, text: impl Into<String>) {
        if value.place != Place::Unreadable {
            self.add(value.place.clone(), value.spec.key(), text);
        }
    }

    /// The value, which must be set. `why` goes on where "is not set: " ends.
    pub fn require<T: Clone>(&mut self, value: &Value<Option<T>>, why: &str) -> Option<T> {
        if value.value.is_none() {
            self.missing(value, why);
        }
        value.value.clone()
    }

    /// Notes that a value is not set, and the three ways to set it.
    pub fn missing<T>(&mut self, value: &Value<T>, why: &str) {
        let Value { spec, .. } = value;
        let text = format!(
            "is not set: {why} (--{} {}, {}, or {} in the file)",
            spec.flag(),
            spec.placeholder,
            spec.variable(self.prefix),
            spec.key(),
        );
        self.at(value, text);
    }

    /// Notes a value outside its range. `show` writes a value as it would stand in the file.
    pub fn within<T: PartialOrd, D: Display>(
        &mut self,
        value: &Value<T>,
        range: &RangeInclusive<T>,
        show: impl Fn(&T) -> D,
    ) {
        if !range.contains(value) {
            let text = format!(
                "{} is out of range: use {} to {}",
                show(value),
                show(range.start()),
                show(range.end())
            );
            self.at(value, text);
        }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.found.len()
    }

    /// Whether all is well.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Each, in the order of finding.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.found.iter()
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, problem: &Problem) -> fmt::Result {
        let file = self.file.as_deref().unwrap_or_else(|| "configuration file".as_ref()).display();
        let Problem { place, key, text } = problem;
        match place {
            Place::File { line, column } if key.is_empty() => write!(f, "{file}:{line}:{column}: {text}"),
            Place::File { line, column } => write!(f, "{file}:{line}:{column}: {key}: {text}"),
            Place::WholeFile => write!(f, "{file}: {text}"),
            Place::Flag(name) | Place::Variable(name) => write!(f, "{name}: {text}"),
            Place::Default | Place::Unreadable => write!(f, "{key}: {text}"),
        }
    }
}

impl Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted: Vec<&Problem> = self.found.iter().collect();
        // Top to bottom of the file, then the rest in the order of finding: the sort is stable.
        sorted.sort_by_key(|problem| match problem.place {
            Place::WholeFile => (0, 0),
            Place::File { line, column } => (line, column),
            _ => (u64::MAX, 0),
        });
        for (index, problem) in sorted.into_iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            self.write(f, problem)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
