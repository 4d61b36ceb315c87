//! The configuration file as a tree of nodes that remember where they stand, and the hunt for keys that nobody knows.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

use super::{GroupSpec, Place, Problems, Spec};

/// Something that was said, wherever it was said: flags and variables become nodes too.
#[derive(Clone, Debug)]
pub struct Node {
    /// What was said.
    pub kind: Kind,
    /// Where.
    pub place: Place,
}

/// What a [`Node`] holds.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A key with nothing behind it: the same as no key.
    Empty,
    /// A scalar, as text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping.
    Map(Vec<Entry>),
}

impl Kind {
    /// What to call it in an error.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Empty => "nothing",
            Self::Text(_) => "a plain value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// One key of a mapping, and what stands behind it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub place: Place,
    /// What stands behind it.
    pub value: Node,
}

/// Reads the text of a configuration file. `None` if it is not YAML, or not a mapping at the top.
pub(super) fn parse(text: &str, problems: &mut Problems) -> Option<Vec<Entry>> {
    // Numbers are read again later, by the type that a key has: they must arrive as they were written, such as 0660.
    let options = serde_saphyr::options! {
        with_snippet: false,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
    };
    let root: Node = match serde_saphyr::from_str_with_options(text, options) {
        Ok(root) => root,
        Err(error) => {
            let place = error.location().map_or(Place::WholeFile, place);
            problems.add(place, "", format!("not valid YAML: {}", message(&error)));
            return None;
        }
    };
    match root.kind {
        Kind::Empty => Some(Vec::new()),
        Kind::Map(entries) => Some(entries),
        other => {
            problems.add(
                root.place,
                "",
                format!("the file must be a mapping of keys to values, not {}", other.name()),
            );
            None
        }
    }
}

fn place(location: serde_saphyr::Location) -> Place {
    Place::File { line: location.line(), column: location.column() }
}

/// The parser's words, without the location that it adds: that has been said in front.
fn message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let end = text.rfind(" at line ").or_else(|| text.rfind(" (line ")).unwrap_or(text.len());
    let first = text[..end].lines().next().unwrap_or_default();
    // It also says which of its own options would have helped.
    let first = first.split_once(", set ").map_or(first, |(what, _option)| what);
    first.trim_start_matches("error: ").to_owned()
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Kind>::deserialize(deserializer)?;
        Ok(Self { kind: value, place: place(referenced) })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Empty)
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Empty)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        Kind::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Kind, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Kind::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kind, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let (place, key) = (place(key.referenced), key.value);
            entries.push(Entry { key, place, value: map.next_value()? });
        }
        Ok(Kind::Map(entries))
    }
}

/// The node of a setting, if the file has one that says something.
pub(super) fn find<'a>(entries: &'a [Entry], spec: &Spec) -> Option<&'a Node> {
    let get = |entries: &'a [Entry], key: &str| {
        entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
    };
    let node = match spec.group {
        "" => get(entries, spec.name)?,
        group => match &get(entries, group)?.kind {
            Kind::Map(inner) => get(inner, spec.name)?,
            _ => return None,
        },
    };
    (!matches!(node.kind, Kind::Empty)).then_some(node)
}

/// Notes every key that no setting has, with the one that was probably meant.
pub(super) fn check_keys(entries: &[Entry], groups: &[GroupSpec], problems: &mut Problems) {
    let specs = || groups.iter().flat_map(|group| group.settings);
    let known: Vec<String> = specs().map(Spec::key).collect();
    for entry in entries {
        if specs().any(|spec| spec.group.is_empty() && spec.name == entry.key) {
            continue;
        }
        if !specs().any(|spec| spec.group == entry.key) {
            unknown(entry, &entry.key, &known, problems);
            continue;
        }
        match &entry.value.kind {
            Kind::Empty => {}
            Kind::Map(inner) => {
                for inner in inner {
                    if !specs().any(|spec| spec.group == entry.key && spec.name == inner.key) {
                        unknown(inner, &format!("{}.{}", entry.key, inner.key), &known, problems);
                    }
                }
            }
            other => {
                let text = format!("must be a mapping of keys to values, not {}", other.name());
                problems.add(entry.value.place.clone(), entry.key.clone(), text);
            }
        }
    }
}

fn unknown(entry: &Entry, key: &str, known: &[String], problems: &mut Problems) {
    let hint = match nearest(key, &known.iter().map(String::as_str).collect::<Vec<_>>()) {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => "unknown key; --help lists all that there are".to_owned(),
    };
    problems.add(entry.place.clone(), key, hint);
}

/// The known key that was probably meant by `key`. A right name in the wrong group counts as near.
pub fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let flat = |key: &str| key.replace(['-', '_', '.'], "").to_lowercase();
    let last = |key: &str| flat(key.rsplit('.').next().unwrap_or(key));
    if let Some(same) = known.iter().find(|other| flat(other) == flat(key)) {
        return Some(same);
    }
    let distance = |other: &str| strsim::damerau_levenshtein(&flat(key), &flat(other));
    let best = known.iter().min_by_key(|other| distance(other))?;
    // A third of the letters may be wrong: more is no longer a slip.
    if distance(best) <= flat(key).len() / 3 {
        return Some(best);
    }
    known.iter().find(|other| last(other) == last(key)).copied()
}
