//! Tests of the settings on a small table of their own.

use std::{collections::HashMap, ffi::OsString, io::Write, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Command, FromArgMatches};

use super::*;

crate::settings_group! {
    /// General
    struct TopSettings in "" {
        /// What this one is called.
        name: Option<PathBuf>,
        /// Doors to knock at.
        doors: List<SocketAddr> = "127.0.0.1:1,127.0.0.1:2",
    }
}

crate::settings_group! {
    /// Kettle
    struct KettleSettings in "kettle" {
        /// How long to wait. And then some
        /// more text.
        max_wait: Duration = "3m",
        /// How much water.
        water: Size = "1MiB",
        /// How many cups.
        cups: u32 = "2",
    }
}

crate::settings! {
    /// For the tests.
    struct TestSettings for Self, variables "TEA" {
        top: TopSettings,
        kettle: KettleSettings,
    }
}

impl TestSettings {
    #[allow(clippy::unnecessary_wraps)]
    fn validate(self, problems: &mut Problems) -> Option<Self> {
        problems.within(&self.kettle.cups, &(1..=10), u32::to_string);
        Some(self)
    }
}

fn load(file: &str, flags: &[&str], variables: &[(&str, &str)]) -> Result<TestSettings, String> {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.as_bytes()).unwrap();
    let path = written.path().to_str().unwrap();
    let command = Flags::<TestSettings>::augment_args(Command::new("tea"));
    let given = ["tea", "--config", path].into_iter().chain(flags.iter().copied());
    let matches = command.try_get_matches_from(given).map_err(|error| error.to_string())?;
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    Flags::<TestSettings>::from_arg_matches(&matches)
        .unwrap()
        .load(|name| variables.get(name).map(OsString::from))
        .map_err(|problems| problems.to_string().replace(path, "FILE"))
}

#[test]
fn defaults_hold_when_nobody_says_anything() {
    for file in ["", "# nothing\n", "kettle:\n", "kettle:\n  water:\n", "---\n"] {
        let settings = load(file, &[], &[]).unwrap();
        assert_eq!(*settings.kettle.max_wait, Duration::from_secs(180), "{file:?}");
        assert_eq!(*settings.kettle.water, Size(1 << 20));
        assert_eq!(settings.top.doors.len(), 2);
        assert!(settings.top.name.is_none());
        assert_eq!(settings.kettle.cups.place, Place::Default);
    }
}

#[test]
fn flag_wins_over_environment_over_file() {
    let file = "kettle: {cups: 3, water: 64, max_wait: 1s}\n";
    let variables = [("TEA_KETTLE_CUPS", "4"), ("TEA_KETTLE_WATER", "2KiB")];
    let settings = load(file, &["--kettle-cups", "5"], &variables).unwrap();
    assert_eq!(*settings.kettle.cups, 5);
    assert_eq!(settings.kettle.cups.place, Place::Flag("--kettle-cups".into()));
    assert_eq!(*settings.kettle.water, Size(2048));
    assert_eq!(*settings.kettle.max_wait, Duration::from_secs(1));
}

#[test]
fn an_empty_variable_is_an_unset_one() {
    assert_eq!(*load("kettle: {cups: 3}", &[], &[("TEA_KETTLE_CUPS", "")]).unwrap().kettle.cups, 3);
}

#[test]
fn lists_come_in_every_form() {
    let ports =
        |settings: TestSettings| settings.top.doors.iter().map(|(door, _)| door.port()).collect::<Vec<_>>();
    let two = vec![3, 4];
    assert_eq!(ports(load("doors: ['[::1]:3', '[::1]:4']", &[], &[]).unwrap()), two);
    assert_eq!(ports(load("doors:\n- '[::1]:3'\n- '[::1]:4'", &[], &[]).unwrap()), two);
    assert_eq!(ports(load("doors: '[::1]:3'", &[], &[]).unwrap()), [3]);
    assert_eq!(ports(load("", &["--door", "[::1]:3", "--doors", "[::1]:4"], &[]).unwrap()), two);
    assert_eq!(ports(load("", &["--doors", "[::1]:3,[::1]:4"], &[]).unwrap()), two);
    assert_eq!(ports(load("", &[], &[("TEA_DOORS", "[::1]:3, [::1]:4")]).unwrap()), two);
    assert!(ports(load("doors: []", &[], &[]).unwrap()).is_empty());
    assert!(ports(load("", &["--doors", ""], &[]).unwrap()).is_empty());
}

#[test]
fn every_problem_is_named_at_once_with_its_place() {
    let file = "kettle:\n  max_wait: soon\n  watr: 3\n  cups: 11\ndoors: [127.0.0.1:5, nowhere]\nmax-wait: 1s\nbogus: 1\n";
    let text = load(file, &["--kettle-water", "much"], &[]).unwrap_err();
    let expected = [
        "FILE:2:13: kettle.max_wait: \"soon\" is not a duration with its unit, such as 500ms, 10s or 1m30s",
        "FILE:3:3: kettle.watr: unknown key; did you mean kettle.water?",
        "FILE:4:9: kettle.cups: 11 is out of range: use 1 to 10",
        "FILE:5:22: doors: \"nowhere\" is not an IP address and port, such as 0.0.0.0:8443 or [::]:8443",
        "FILE:6:1: max-wait: unknown key; did you mean kettle.max_wait?",
        "FILE:7:1: bogus: unknown key; --help lists all that there are",
        "--kettle-water: \"much\" is not a size, such as 65536, 64KiB, 1MiB or 1GiB",
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn wrong_shapes_say_what_was_expected() {
    assert_eq!(
        load("kettle:\n  cups: [1, 2]\n", &[], &[]).unwrap_err(),
        "FILE:2:9: kettle.cups: a list is not a whole number from 0 to 4294967295"
    );
    assert_eq!(
        load("kettle: 3\n", &[], &[]).unwrap_err(),
        "FILE:1:9: kettle: must be a mapping of keys to values, not a plain value"
    );
    assert!(load("- a\n", &[], &[]).unwrap_err().contains("FILE:1:1: the file must be a mapping"));
}

#[test]
fn broken_yaml_names_line_and_column() {
    for file in ["kettle: {cups: 1\n", "a: b: c\n", "kettle:\n\tcups: 1\n", "name: a\nname: b\n"] {
        let text = load(file, &[], &[]).unwrap_err();
        assert!(text.starts_with("FILE:") && text.contains(": not valid YAML: "), "{file:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn a_missing_file_is_the_only_problem() {
    let command = Flags::<TestSettings>::augment_args(Command::new("tea"));
    let matches = command.try_get_matches_from(["tea", "--config", "/nonexistent/tea.yaml"]).unwrap();
    let problems =
        Flags::<TestSettings>::from_arg_matches(&matches).unwrap().load(|_| None).unwrap_err().to_string();
    assert!(problems.starts_with("/nonexistent/tea.yaml: cannot be read: "), "{problems}");
}

#[test]
fn sizes_and_their_texts() {
    for (text, bytes) in [("0", 0), ("65536", 65536), ("64KiB", 65536), ("1 MiB", 1 << 20), ("2Gi", 2 << 30)]
    {
        assert_eq!(Size::parse(text), Ok(Size(bytes)), "{text}");
    }
    for text in ["", "KiB", "-1", "1.5MiB", "1MB", "99999999999GiB", "1 2"] {
        assert!(Size::parse(text).is_err(), "{text}");
    }
    for (bytes, text) in [(0, "0"), (1500, "1500"), (65536, "64KiB"), (64 << 20, "64MiB")] {
        assert_eq!(Size(bytes).to_string(), text);
    }
}

#[test]
fn help_has_defaults_and_all_of_the_text() {
    let mut command = Flags::<TestSettings>::augment_args(Command::new("tea"));
    let short = command.render_help().to_string();
    assert!(short.contains("How long to wait [default: 3m]"), "{short}");
    let long = command.render_long_help().to_string();
    assert!(long.contains("How long to wait. And then some more text.\n          [default: 3m]"), "{long}");
    command.debug_assert();
}
