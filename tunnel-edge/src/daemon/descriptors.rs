//! How many files and connections the process may have open at one time. Each program raises the limit when it starts, and
//! says in its log when that is not enough for what its settings allow.

use std::fmt::Write;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a program opens besides its connections: the runtime, files that are read again, lookups of names.
const OTHERS: usize = 64;

/// What may have descriptors open: the setting that limits it, and how many that makes at most.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Its key.
    pub setting: &'static str,
    /// How many.
    pub count: usize,
}

/// Raises the limit as far as this process may by itself. What it is then.
///
/// It is low for the sake of programs that cannot deal with numbers above 1023, of which this is none.
pub fn raise() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // What cannot be raised is as it was, and that is what counts.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let raised = getrlimit(Resource::Nofile).current;
    raised.and_then(|raised| usize::try_from(raised).ok()).unwrap_or(usize::MAX)
}

/// How many descriptors are left when all that is needed is taken.
pub fn left(limit: usize, needs: &[Need]) -> usize {
    limit.saturating_sub(sum(needs))
}

/// What to tell whoever set it up so, if the limit is not enough.
pub fn shortage(limit: usize, needs: &[Need]) -> Option<String> {
    let sum = sum(needs);
    if sum <= limit {
        return None;
    }
    let mut text = format!(
        "the limit of open files (RLIMIT_NOFILE) is {limit}, but the settings allow for {sum}: raise it to that \
         (LimitNOFILE= of a systemd unit, ulimit -n), or lower a setting. Needed are"
    );
    for Need { setting, count } in needs {
        let _ = write!(text, " {count} for {setting},");
    }
    let _ = write!(text, " {OTHERS} for others");
    Some(text)
}

fn sum(needs: &[Need]) -> usize {
    needs.iter().fold(OTHERS, |sum, need| sum.saturating_add(need.count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_names_each_setting_and_its_number() {
        let needs =
            [Need { setting: "edges.max_links", count: 1000 }, Need { setting: "admin.listen", count: 64 }];
        assert_eq!(shortage(1128, &needs), None);
        assert_eq!((left(1128, &needs), left(1130, &needs), left(5, &needs)), (0, 2, 0));
        let text = shortage(1127, &needs).unwrap();
        assert!(text.starts_with(
            "the limit of open files (RLIMIT_NOFILE) is 1127, but the settings allow for 1128:"
        ));
        assert!(
            text.ends_with("Needed are 1000 for edges.max_links, 64 for admin.listen, 64 for others"),
            "{text}"
        );
    }
}
