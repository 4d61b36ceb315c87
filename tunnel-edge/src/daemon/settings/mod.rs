//! Settings: every value can be given in one YAML file, as a flag and as an environment variable, and is defined once.
//!
//! The way of a value, from top to bottom of these files:
//!
//! 1. [`settings_group!`](crate::settings_group) defines it: key, type, default and the text that `--help` shows.
//!    [`settings!`](crate::settings) joins groups to all that one binary can be told.
//! 2. [`Flags`] takes the flags from the command line; `sources` adds environment and file, and knows which wins.
//! 3. `document` reads the file into nodes that remember their line and column, and refuses keys that nobody knows.
//! 4. `text` turns a node into the value's type, or says what was expected.
//! 5. A binary's `config.rs` checks what no single value can show, and makes its `Config`.
//!
//! Nothing stops at the first mistake: [`Problems`] collects them, each with the place that it came from.
//!
//! The names follow from the key by one rule. `max_links` in the group `edges` of the gateway is `edges: {max_links: N}`
//! in the file, `--edges-max-links N` as a flag and `TUNNEL_SERVER_EDGES_MAX_LINKS=N` in the environment. A list may be
//! given as several flags, or as one text with separators; its flag also has a singular name.

mod document;
mod problems;
mod sources;
mod text;

use std::ops::Deref;

pub use document::{Entry, Kind, Node, nearest};
pub use problems::{Place, Problem, Problems};
pub use sources::{Flags, Reader, defaults, environment};
pub use text::{OrNone, Parse, Size, not_expected, parse_list};

/// One value that can be set: all that file, flags, environment and `--help` need to know of it.
#[derive(Debug)]
pub struct Spec {
    /// The group that it stands in; empty for the top level of the file.
    pub group: &'static str,
    /// Its key within the group.
    pub name: &'static str,
    /// What it is for, one line of the definition per line.
    pub about: &'static str,
    /// What it is when nobody says anything; the same text could stand in the file.
    pub default: Option<&'static str>,
    /// What stands for it in `--help`.
    pub placeholder: &'static str,
    /// For a list: what separates its items when they come as one text.
    pub separator: Option<char>,
}

impl Spec {
    /// The key with its group, as in `edges.max_links`.
    pub fn key(&self) -> String {
        match self.group {
            "" => self.name.to_owned(),
            group => format!("{group}.{}", self.name),
        }
    }

    /// The flag without its dashes.
    pub fn flag(&self) -> String {
        self.key().replace(['.', '_'], "-")
    }

    /// The environment variable.
    pub fn variable(&self, prefix: &str) -> String {
        format!("{prefix}_{}", self.key().replace('.', "_").to_uppercase())
    }
}

/// A heading of `--help`, and the values under it.
#[derive(Debug)]
pub struct GroupSpec {
    /// The heading.
    pub heading: &'static str,
    /// The values in the order of `--help`.
    pub settings: &'static [Spec],
}

/// What [`settings_group!`](crate::settings_group) implements.
pub trait Group: Sized {
    /// The definitions.
    const SPEC: GroupSpec;

    /// Reads each value from wherever it was given.
    fn read(reader: &mut Reader<'_>) -> Self;
}

/// All that one binary can be told. What [`settings!`](crate::settings) implements.
pub trait Settings: Sized + Send + Sync + 'static {
    /// What environment variables begin with, without the underscore.
    const ENV_PREFIX: &'static str;
    /// All groups in the order of `--help`.
    const GROUPS: &'static [GroupSpec];
    /// What becomes of the settings once they are known to be right.
    type Config;

    /// Reads every group.
    fn read(reader: &mut Reader<'_>) -> Self;

    /// Checks what no single value can show. `None` if there are problems.
    fn validate(self, problems: &mut Problems) -> Option<Self::Config>;
}

/// A value, and where it was said.
#[derive(Clone, Debug)]
pub struct Value<T> {
    /// What was said; if that could not be read, the default, and a problem was noted.
    pub value: T,
    /// Where it was said.
    pub place: Place,
    /// Its definition.
    pub spec: &'static Spec,
}

impl<T> Deref for Value<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// A list whose items remember where each was said.
pub type List<T> = Vec<(T, Place)>;

/// A type that a value may have in a definition: a [`Parse`] type with a default, an [`Option`] of one without, or a
/// [`List`].
pub trait Field: Sized {
    /// What stands for it in `--help`.
    const PLACEHOLDER: &'static str;
    /// For lists.
    const SEPARATOR: Option<char> = None;

    /// The value of a node; `None` if it cannot be read, with a problem noted.
    fn from_node(node: &Node, spec: &'static Spec, problems: &mut Problems) -> Option<Self>;

    /// The value when nothing was said. A default that cannot be read is a mistake in the definition.
    fn unset(spec: &'static Spec) -> Self;
}

impl<T: Parse> Field for T {
    const PLACEHOLDER: &'static str = T::PLACEHOLDER;

    fn from_node(node: &Node, spec: &'static Spec, problems: &mut Problems) -> Option<Self> {
        T::parse_node(node, &spec.key(), problems)
    }

    fn unset(spec: &'static Spec) -> Self {
        let default = spec.default.unwrap_or_default();
        T::parse(default).unwrap_or_else(|error| panic!("the default of {} is wrong: {error}", spec.key()))
    }
}

impl<T: Parse> Field for Option<T> {
    const PLACEHOLDER: &'static str = T::PLACEHOLDER;

    fn from_node(node: &Node, spec: &'static Spec, problems: &mut Problems) -> Option<Self> {
        T::parse_node(node, &spec.key(), problems).map(Some)
    }

    fn unset(_spec: &'static Spec) -> Self {
        None
    }
}

impl<T: Parse> Field for List<T> {
    const PLACEHOLDER: &'static str = T::PLACEHOLDER;
    const SEPARATOR: Option<char> = Some(T::SEPARATOR);

    fn from_node(node: &Node, spec: &'static Spec, problems: &mut Problems) -> Option<Self> {
        parse_list(node, &spec.key(), problems)
    }

    fn unset(spec: &'static Spec) -> Self {
        let items = spec.default.into_iter().flat_map(|text| text.split(T::SEPARATOR));
        let parse = |text: &str| {
            T::parse(text.trim())
                .unwrap_or_else(|error| panic!("the default of {} is wrong: {error}", spec.key()))
        };
        items.map(|text| (parse(text), Place::Default)).collect()
    }
}

/// Defines a group of settings: a struct of [`Value`]s, and their [`GroupSpec`].
///
/// ```
/// use std::{path::PathBuf, time::Duration};
/// tunnel_edge::settings_group! {
///     /// Kettle (how tea is made)
///     pub struct KettleSettings in "kettle" {
///         /// How long to wait for the water.
///         timeout: Duration = "3m",
///         /// Where the tea is kept.
///         tea: Option<PathBuf>,
///     }
/// }
/// ```
#[macro_export]
macro_rules! settings_group {
    (
        #[doc = $heading:literal]
        $vis:vis struct $Group:ident in $group:literal {
            $( $(#[doc = $about:literal])+ $field:ident : $type:ty $(= $default:literal)? ),* $(,)?
        }
    ) => {
        #[doc = $heading]
        #[derive(Clone, Debug)]
        $vis struct $Group {
            $( $(#[doc = $about])+ pub $field: $crate::daemon::settings::Value<$type>, )*
        }

        impl $crate::daemon::settings::Group for $Group {
            const SPEC: $crate::daemon::settings::GroupSpec = $crate::daemon::settings::GroupSpec {
                heading: $heading,
                settings: &[ $(
                    $crate::settings_group!(@spec $group, $field, $type, [$($about)+], [$($default)?])
                ),* ],
            };

            fn read(reader: &mut $crate::daemon::settings::Reader<'_>) -> Self {
                Self { $(
                    $field: reader.value(const {
                        &$crate::settings_group!(@spec $group, $field, $type, [$($about)+], [$($default)?])
                    }),
                )* }
            }
        }
    };
    (@spec $group:literal, $field:ident, $type:ty, [$($about:literal)+], [$($default:literal)?]) => {
        $crate::daemon::settings::Spec {
            group: $group,
            name: stringify!($field),
            about: concat!($($about, "\n"),+),
            default: $crate::settings_group!(@default $($default)?),
            placeholder: <$type as $crate::daemon::settings::Field>::PLACEHOLDER,
            separator: <$type as $crate::daemon::settings::Field>::SEPARATOR,
        }
    };
    (@default) => { None };
    (@default $default:literal) => { Some($default) };
}

/// Joins groups to all that one binary can be told. Their order is that of `--help`; a method
/// `validate(self, &mut Problems) -> Option<Config>` of the struct does what [`Settings::validate`] says.
#[macro_export]
macro_rules! settings {
    (
        $(#[$attribute:meta])*
        $vis:vis struct $Settings:ident for $Config:ty, variables $prefix:literal {
            $( $field:ident : $Group:ty ),* $(,)?
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Debug)]
        $vis struct $Settings { $( #[allow(missing_docs)] pub $field: $Group, )* }

        impl $crate::daemon::settings::Settings for $Settings {
            const ENV_PREFIX: &'static str = $prefix;
            const GROUPS: &'static [$crate::daemon::settings::GroupSpec] =
                &[ $( <$Group as $crate::daemon::settings::Group>::SPEC ),* ];
            type Config = $Config;

            fn read(reader: &mut $crate::daemon::settings::Reader<'_>) -> Self {
                Self { $( $field: $crate::daemon::settings::Group::read(reader), )* }
            }

            fn validate(self, problems: &mut $crate::daemon::settings::Problems) -> Option<$Config> {
                Self::validate(self, problems)
            }
        }
    };
}

#[cfg(test)]
mod tests;
