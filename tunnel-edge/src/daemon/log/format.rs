//! How a line looks, and the one place where whatever stands in it is made harmless: a value from outside may hold line
//! breaks, escape codes of terminals and marks that turn the direction of text, all of which would forge lines. Used by
//! [`super::init`], and by [`one_line`] for whatever else shows text from outside.

use std::fmt::{self, Write};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_log::NormalizeEvent;
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// Longest value of a field, in bytes of the line. More is cut, and the line says so.
const MAX_VALUE: usize = 4096;

/// Whether a character does something to a terminal or a viewer instead of being shown.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` on one line, each harmful character written as Rust would, such as `\n` and `\u{1b}`.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    let _ = Harmless { out: &mut line, left: usize::MAX, cut: 0 }.write_str(text);
    line
}

/// Writes what it is given without its harmful characters, up to a length.
struct Harmless<'a> {
    out: &'a mut dyn Write,
    left: usize,
    /// Bytes that were left out.
    cut: usize,
}

impl Harmless<'_> {
    fn value(out: &mut dyn Write, value: &dyn fmt::Debug) -> fmt::Result {
        let mut harmless = Harmless { out, left: MAX_VALUE, cut: 0 };
        write!(harmless, "{value:?}")?;
        match harmless.cut {
            0 => Ok(()),
            cut => write!(out, "... ({cut} bytes more)"),
        }
    }
}

impl Write for Harmless<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| self.write_char(c))
    }

    fn write_char(&mut self, c: char) -> fmt::Result {
        if c.len_utf8() > self.left || self.cut > 0 {
            self.cut += c.len_utf8();
            return Ok(());
        }
        self.left -= c.len_utf8();
        if is_harmful(c) { write!(self.out, "{}", c.escape_default()) } else { self.out.write_char(c) }
    }
}

/// Fields for people: `name=value`, the message as it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = TextLine { writer, is_first: true, result: Ok(()) };
        fields.record(&mut line);
        line.result
    }
}

struct TextLine<'writer> {
    writer: Writer<'writer>,
    is_first: bool,
    result: fmt::Result,
}

impl TextLine<'_> {
    fn field(&mut self, name: &str, value: &dyn fmt::Debug) -> fmt::Result {
        if !std::mem::take(&mut self.is_first) {
            self.writer.write_char(' ')?;
        }
        match name {
            "message" => {}
            name if self.writer.has_ansi_escapes() => {
                write!(self.writer, "\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m")?;
            }
            name => write!(self.writer, "{name}=")?,
        }
        Harmless::value(&mut self.writer, value)
    }
}

impl Visit for TextLine<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() && !is_of_log(field) {
            self.result = self.field(field.name(), value);
        }
    }
}

/// Whether this is one of the fields by which `tracing-log` carries where a line comes from.
fn is_of_log(field: &Field) -> bool {
    field.name().starts_with("log.")
}

/// Lines for machines: one object each, the fields beside `timestamp`, `level`, `message` and `module`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut line = JsonLine { text: String::from("{"), result: Ok(()) };
        line.add("timestamp", &timestamp);
        line.add("level", &metadata.level().as_str());
        event.record(&mut line);
        line.add("module", &metadata.target());
        line.result?;
        writeln!(writer, "{}}}", line.text)
    }
}

struct JsonLine {
    text: String,
    result: fmt::Result,
}

impl JsonLine {
    fn add(&mut self, key: &str, value: &impl serde::Serialize) {
        let json = (serde_json::to_string(key), serde_json::to_string(value));
        let (Ok(key), Ok(value)) = json else {
            self.result = Err(fmt::Error);
            return;
        };
        let comma = if self.text.len() > 1 { "," } else { "" };
        let written = write!(self.text, "{comma}{key}:{value}");
        self.result = self.result.and(written);
    }
}

impl Visit for JsonLine {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), &value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        // JSON numbers have no bound, but their readers do.
        match u64::try_from(value) {
            Ok(value) => self.add(field.name(), &value),
            Err(_) => self.add(field.name(), &value.to_string()),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if is_of_log(field) {
            return;
        }
        let mut text = String::new();
        let written = Harmless::value(&mut text, value);
        self.result = self.result.and(written);
        self.add(field.name(), &text);
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use parking_lot::Mutex;
    use tracing::{info, subscriber::with_default};
    use tracing_subscriber::fmt::{MakeWriter, fmt};

    use super::*;

    /// What a client may have in its certificate.
    const FORGED: &str = "a\nINFO ok\r\u{1b}[2J\u{9b}1m\u{7f}\u{202e}\u{2028}\u{61c}\u{200f}\u{2069}\tb";
    const HARMLESS: &str = r"a\nINFO ok\r\u{1b}[2J\u{9b}1m\u{7f}\u{202e}\u{2028}\u{61c}\u{200f}\u{2069}\tb";

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock())).unwrap()
        }
    }

    fn event() {
        let error = io::Error::other(FORGED);
        info!(plain = FORGED, shown = %FORGED, debugged = ?[FORGED], %error,
              cause = &error as &(dyn std::error::Error + 'static), number = 7_u128, "from {FORGED}");
    }

    #[test]
    fn no_value_breaks_a_line_for_people() {
        let lines = Lines::default();
        for ansi in [false, true] {
            let subscriber = fmt().fmt_fields(TextFields).with_ansi(ansi).with_writer(lines.clone()).finish();
            with_default(subscriber, event);
            let line = lines.text();
            let (of_line, line) = (line.clone(), line.strip_suffix('\n').unwrap().to_owned());
            let plain = ["\x1b[0m", "\x1b[2m", "\x1b[3m", "\x1b[32m"];
            let line = plain.iter().filter(|_| ansi).fold(line, |line, code| line.replace(code, ""));
            assert!(!line.chars().any(is_harmful), "{of_line:?}");
            let expected = format!(
                "from {HARMLESS} plain=\"{HARMLESS}\" shown={HARMLESS} debugged=[\"{HARMLESS}\"] error={HARMLESS} \
                 cause={HARMLESS} number=7"
            );
            assert!(line.ends_with(&expected), "{of_line}");
        }
    }

    #[test]
    fn no_value_breaks_a_line_for_machines() {
        let lines = Lines::default();
        let subscriber = fmt().event_format(Json).with_writer(lines.clone()).finish();
        with_default(subscriber, || {
            event();
            info!(target: "code", target = "edge-a:10250", yes = true, part = 0.5, below = -1_i64, above = 1_u64, "m");
            info!(number = u128::MAX);
        });
        let text = lines.text();
        assert!(!text.chars().any(|c| c != '\n' && is_harmful(c)), "{text:?}");
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let first = &lines[0];
        for key in ["plain", "shown", "error", "cause"] {
            assert_eq!(first[key], HARMLESS);
        }
        assert_eq!(first["message"], format!("from {HARMLESS}"));
        assert_eq!((&first["level"], &first["number"]), (&"INFO".into(), &7.into()));
        assert!(first["timestamp"].as_str().unwrap().ends_with('Z'), "{first}");
        let second = &lines[1];
        assert_eq!((&second["target"], &second["module"]), (&"edge-a:10250".into(), &"code".into()));
        assert_eq!((&second["yes"], &second["part"]), (&true.into(), &0.5.into()));
        assert_eq!((&second["below"], &second["above"]), (&(-1).into(), &1.into()));
        assert_eq!(lines[2]["number"], u128::MAX.to_string());
    }

    #[test]
    fn a_long_value_is_cut_and_the_line_says_so() {
        let lines = Lines::default();
        let subscriber = fmt().fmt_fields(TextFields).with_ansi(false).with_writer(lines.clone()).finish();
        let long = "x".repeat(MAX_VALUE - 1);
        with_default(
            subscriber,
            || info!(fits = %format_args!("{long}x"), cut = %format_args!("{long}üxy"), "m"),
        );
        let line = lines.text();
        assert!(line.ends_with(&format!("m fits={long}x cut={long}... (4 bytes more)\n")), "{line}");
    }

    #[test]
    fn where_a_line_of_the_log_crate_comes_from_is_told_once() {
        let record = || {
            let module = "rustls::conn";
            let args = format_args!("said");
            let record = log::Record::builder().level(log::Level::Warn).target(module).args(args).build();
            tracing_log::format_trace(&record).unwrap();
        };
        let lines = Lines::default();
        let subscriber = fmt().fmt_fields(TextFields).with_ansi(false).with_writer(lines.clone()).finish();
        with_default(subscriber, record);
        assert!(lines.text().ends_with(" WARN rustls::conn: said\n"));
        with_default(fmt().event_format(Json).with_writer(lines.clone()).finish(), record);
        let line: serde_json::Value = serde_json::from_str(&lines.text()).unwrap();
        assert_eq!((&line["module"], &line["level"]), (&"rustls::conn".into(), &"WARN".into()));
        assert_eq!(line.as_object().unwrap().len(), 4, "{line}");
    }

    #[test]
    fn one_line_has_no_end() {
        assert_eq!(one_line(FORGED), HARMLESS);
        assert_eq!(one_line("Grüße, 世界"), "Grüße, 世界");
    }
}
