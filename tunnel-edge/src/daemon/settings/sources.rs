//! Where settings come from, and which wins: flag over environment over file over default.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint, error::Result as ClapResult,
};

use super::{
    Entry, Field, GroupSpec, Kind, Node, Place, Problems, Settings, Spec, Value,
    document::{check_keys, find, parse},
};

/// The flags of a subcommand that takes settings, as they were given. Use it as a field or variant of a clap type.
#[derive(Clone, Debug)]
pub struct Flags<S> {
    config: Option<PathBuf>,
    given: BTreeMap<String, Vec<String>>,
    settings: PhantomData<fn() -> S>,
}

impl<S> Default for Flags<S> {
    fn default() -> Self {
        Self { config: None, given: BTreeMap::new(), settings: PhantomData }
    }
}

/// The environment of this process.
pub fn environment(name: &str) -> Option<OsString> {
    env::var_os(name)
}

impl<S: Settings> Flags<S> {
    /// Reads file, environment and flags, and checks everything. All that is wrong comes at once.
    pub fn load(&self, environment: impl Fn(&str) -> Option<OsString>) -> Result<S::Config, Problems> {
        let environment = |name: &str| environment(name).filter(|value| !value.is_empty());
        let file =
            self.config.clone().or_else(|| environment(&config_variable(S::ENV_PREFIX)).map(PathBuf::from));
        let mut problems = Problems::new(S::ENV_PREFIX, file.clone());
        let entries = match file {
            Some(path) => read_file(&path, S::GROUPS, &mut problems),
            None => Some(Vec::new()),
        };
        // Without the file, every required value would seem to be missing: say only what is wrong with the file.
        let Some(entries) = entries else { return Err(problems) };
        let mut reader = Reader {
            prefix: S::ENV_PREFIX,
            flags: &self.given,
            environment: &environment,
            entries,
            problems,
        };
        let settings = S::read(&mut reader);
        let mut problems = reader.problems;
        match settings.validate(&mut problems) {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(problems),
        }
    }
}

/// The settings when nothing was said.
pub fn defaults<S: Settings>() -> S {
    let problems = Problems::new(S::ENV_PREFIX, None);
    let (flags, environment) = (BTreeMap::new(), |_: &str| None);
    let entries = Vec::new();
    S::read(&mut Reader {
        prefix: S::ENV_PREFIX,
        flags: &flags,
        environment: &environment,
        entries,
        problems,
    })
}

fn config_variable(prefix: &str) -> String {
    format!("{prefix}_CONFIG")
}

fn read_file(path: &Path, groups: &[GroupSpec], problems: &mut Problems) -> Option<Vec<Entry>> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let entries = parse(&text, problems)?;
            check_keys(&entries, groups, problems);
            Some(entries)
        }
        Err(error) => {
            problems.add(Place::WholeFile, "", format!("cannot be read: {error}"));
            None
        }
    }
}

/// Finds each value where it was given. What [`Settings::read`] reads from.
pub struct Reader<'a> {
    prefix: &'static str,
    flags: &'a BTreeMap<String, Vec<String>>,
    environment: &'a dyn Fn(&str) -> Option<OsString>,
    entries: Vec<Entry>,
    problems: Problems,
}

impl Reader<'_> {
    /// The value of one setting. If it cannot be read, a problem is noted and it is as if it were unset.
    pub fn value<T: Field>(&mut self, spec: &'static Spec) -> Value<T> {
        let Some(node) = self.find(spec) else {
            return Value { value: T::unset(spec), place: Place::Default, spec };
        };
        match T::from_node(&node, spec, &mut self.problems) {
            Some(value) => Value { value, place: node.place, spec },
            None => Value { value: T::unset(spec), place: Place::Unreadable, spec },
        }
    }

    fn find(&mut self, spec: &Spec) -> Option<Node> {
        if let Some(texts) = self.flags.get(&spec.key()) {
            let place = Place::Flag(format!("--{}", spec.flag()));
            return Some(from_texts(texts, spec, place));
        }
        let name = spec.variable(self.prefix);
        let Some(value) = (self.environment)(&name) else { return find(&self.entries, spec).cloned() };
        let place = Place::Variable(name);
        if let Ok(text) = value.into_string() {
            return Some(from_texts(&[text], spec, place));
        }
        self.problems.add(place, spec.key(), "is not valid UTF-8");
        None
    }
}

/// A flag's or variable's texts as the node that they would be in the file.
fn from_texts(texts: &[String], spec: &Spec, place: Place) -> Node {
    let node = |text: &str| Node { kind: Kind::Text(text.trim().to_owned()), place: place.clone() };
    let kind = match spec.separator {
        Some(separator) => {
            let items = texts.iter().flat_map(|text| text.split(separator));
            Kind::List(items.filter(|text| !text.trim().is_empty()).map(node).collect())
        }
        None => return node(texts.last().map(String::as_str).unwrap_or_default()),
    };
    Node { kind, place }
}

impl<S: Settings> FromArgMatches for Flags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> ClapResult<Self> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> ClapResult<()> {
        if let Some(path) = matches.get_one::<PathBuf>("config") {
            self.config = Some(path.clone());
        }
        for spec in S::GROUPS.iter().flat_map(|group| group.settings) {
            let key = spec.key();
            if let Some(texts) = matches.get_many::<String>(&key) {
                self.given.insert(key, texts.cloned().collect());
            }
        }
        Ok(())
    }
}

impl<S: Settings> Args for Flags<S> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .short('c')
            .value_name("FILE")
            .value_hint(ValueHint::FilePath)
            .value_parser(clap::value_parser!(PathBuf))
            .help(format!(
                "YAML file with any of the settings below (also {}). Paths in it start at the working directory",
                config_variable(S::ENV_PREFIX)
            ));
        let args =
            S::GROUPS.iter().flat_map(|group| group.settings.iter().map(|spec| arg(spec, group.heading)));
        command.arg(config).args(args)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn arg(spec: &Spec, heading: &'static str) -> Arg {
    let about = spec.about.replace('`', "").split_whitespace().collect::<Vec<_>>().join(" ");
    let singular = spec.separator.and_then(|_| Some(spec.flag().strip_suffix('s')?.to_owned()));
    let default = spec.default.map(|default| format!("[default: {default}]"));
    let also = singular.as_ref().map(|flag| format!("[also: --{flag}]"));
    let notes = default.into_iter().chain(also).collect::<Vec<_>>().join(" ");
    // The first sentence is enough for -h; --help has all.
    let short = about.split_inclusive(". ").next().unwrap_or(&about).trim_end_matches([' ', '.']);
    let arg = Arg::new(spec.key())
        .long(spec.flag())
        .value_name(spec.placeholder)
        .help_heading(heading.trim())
        .help(format!("{short} {notes}").trim_end().to_owned())
        .long_help(format!("{about}\n{notes}").trim_end().to_owned());
    if spec.separator.is_none() {
        return arg.action(ArgAction::Set);
    }
    let arg = arg.action(ArgAction::Append);
    match singular {
        Some(singular) => arg.alias(singular),
        None => arg,
    }
}
