//! The ends of one stream, made exact.
//!
//! yamux can say "no more bytes" but not whether that was a clean end: a reset, a lost connection and a FIN look
//! alike to its readers. So each direction's clean end is confirmed on the control stream by an `End` with the
//! number of bytes, and everything else by an `Abort`. [`Ends`] holds what is known of one stream at one side and
//! gives the verdict.
//!
//! ```text
//!             bytes            eof
//!   receive:  Open ----------> AwaitEnd ---- End, counts equal ------> Finished
//!              |  \               |  \                                    ^
//!              |   \ End          |   `---- End, counts differ --> Aborted(Truncated)
//!              |    `--> AwaitEof ---- eof, counts equal -----------------'
//!              `---- Abort, link lost, time-out in AwaitEnd ----> Aborted
//! ```
//! The contract: call [`Ends::received`] and [`Ends::sent`] for every byte, [`Ends::eof`] when yamux says that no more
//! will come, [`Ends::handle_end`] and [`Ends::abort`] for what the control stream brings. Once aborted, a stream
//! stays aborted, with the first reason.

use super::messages::AbortCode;

/// Why a stream was cut: goes to the caller's log line and over the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Aborted {
    /// What kind of end it was.
    pub code: AbortCode,
    /// For people.
    pub text: String,
}

impl Aborted {
    /// A reason with its text.
    pub fn new(code: AbortCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// What a reader may do at the end of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The direction ended cleanly and whole.
    Clean,
    /// Not known yet: wait for `End` or `Abort`, for a bounded time.
    Wait,
    /// The stream was cut.
    Aborted(Aborted),
}

/// One side's ledger of one stream. See the module's text for the contract.
#[derive(Debug, Default)]
pub struct Ends {
    sent: u64,
    received: u64,
    send_finished: bool,
    eof: bool,
    announced: Option<u64>,
    aborted: Option<Aborted>,
}

impl Ends {
    /// Counts bytes handed to the multiplexer.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// Counts bytes taken from the multiplexer. Bytes beyond an announced end abort the stream.
    pub fn received(&mut self, bytes: usize) {
        self.received += bytes as u64;
        if self.announced.is_some_and(|total| self.received > total) {
            self.judge_counts();
        }
    }

    /// The sending direction ends here: the total for the `End` message. `None` if it had ended before.
    pub fn finish_sending(&mut self) -> Option<u64> {
        (!std::mem::replace(&mut self.send_finished, true)).then_some(self.sent)
    }

    /// The multiplexer has no more bytes, for whatever reason.
    pub fn eof(&mut self) -> Verdict {
        self.eof = true;
        self.judge_counts();
        self.verdict()
    }

    /// The peer's `End`: it sent this many bytes in all.
    pub fn handle_end(&mut self, total: u64) {
        match self.announced {
            Some(earlier) if earlier != total => {
                self.abort(Aborted::new(
                    AbortCode::Protocol,
                    format!("the far side announced two ends, after {earlier} and after {total} bytes"),
                ));
            }
            _ => self.announced = Some(total),
        }
        self.judge_counts();
    }

    /// The stream was cut, by the peer, by this side or with its link. The first reason stays.
    pub fn abort(&mut self, reason: Aborted) {
        self.aborted.get_or_insert(reason);
    }

    /// The stream's link is gone. That cuts the stream unless the link has done all its work for it: then what the
    /// multiplexer still holds is read to its end, and counted, as ever.
    pub fn link_lost(&mut self, reason: Aborted) {
        if !(self.send_finished && self.announced.is_some()) {
            self.abort(reason);
        }
    }

    /// What is known of the receiving direction.
    pub fn verdict(&self) -> Verdict {
        match (&self.aborted, self.announced) {
            (Some(reason), _) => Verdict::Aborted(reason.clone()),
            (None, Some(total)) if self.eof && total == self.received => Verdict::Clean,
            _ => Verdict::Wait,
        }
    }

    /// Why the stream was cut, if it was.
    pub fn aborted(&self) -> Option<&Aborted> {
        self.aborted.as_ref()
    }

    /// Whether both directions have ended cleanly, so that the stream may be forgotten without a word.
    pub fn finished(&self) -> bool {
        self.send_finished && self.verdict() == Verdict::Clean
    }

    /// Bytes sent and received so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.sent, self.received)
    }

    fn judge_counts(&mut self) {
        let Some(total) = self.announced else { return };
        if self.received > total || (self.eof && self.received < total) {
            let received = self.received;
            self.abort(Aborted::new(
                AbortCode::Truncated,
                format!("{received} bytes arrived where the far side sent {total}"),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fin_alone_is_no_end() {
        let mut ends = Ends::default();
        ends.received(5);
        assert_eq!(ends.eof(), Verdict::Wait);
        ends.handle_end(5);
        assert_eq!(ends.verdict(), Verdict::Clean);
        assert!(!ends.finished());
        assert_eq!(ends.finish_sending(), Some(0));
        assert_eq!(ends.finish_sending(), None);
        assert!(ends.finished());
    }

    #[test]
    fn missing_bytes_are_a_truncation() {
        let mut ends = Ends::default();
        ends.received(4);
        ends.handle_end(5);
        assert_eq!(ends.verdict(), Verdict::Wait);
        assert!(matches!(ends.eof(), Verdict::Aborted(Aborted { code: AbortCode::Truncated, .. })));
    }

    #[test]
    fn surplus_bytes_are_noticed_at_once() {
        let mut ends = Ends::default();
        ends.handle_end(5);
        ends.received(6);
        assert!(matches!(ends.verdict(), Verdict::Aborted(Aborted { code: AbortCode::Truncated, .. })));
    }

    #[test]
    fn a_lost_link_cuts_only_what_still_needs_it() {
        let lost = || Aborted::new(AbortCode::LinkLost, "lost");
        let mut done = Ends::default();
        done.finish_sending();
        done.handle_end(5);
        done.link_lost(lost());
        // The bytes are there and only have to be read.
        done.received(5);
        assert_eq!(done.eof(), Verdict::Clean);
        let mut short = Ends::default();
        short.finish_sending();
        short.handle_end(5);
        short.link_lost(lost());
        assert!(matches!(short.eof(), Verdict::Aborted(Aborted { code: AbortCode::Truncated, .. })));
        for sending_finished in [true, false] {
            let mut ends = Ends::default();
            if sending_finished {
                ends.finish_sending();
            } else {
                ends.handle_end(0);
            }
            ends.link_lost(lost());
            assert_eq!(ends.verdict(), Verdict::Aborted(lost()));
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Received(u16),
        Eof,
        End(u64),
        Abort,
    }

    proptest! {
        /// Against the definition: clean if and only if nothing aborted, eof was seen, and every announced total is
        /// what arrived in the end and was never exceeded on the way.
        #[test]
        fn agrees_with_the_definition(steps in proptest::collection::vec(prop_oneof![
            (0..3u16).prop_map(Step::Received),
            Just(Step::Eof),
            (0..6u64).prop_map(Step::End),
            Just(Step::Abort),
        ], 0..12)) {
            let mut ends = Ends::default();
            let (mut received, mut eof, mut totals, mut aborted) = (0u64, false, Vec::new(), false);
            let mut received_after_eof = false;
            for step in &steps {
                match step {
                    Step::Received(n) => {
                        // A multiplexer gives no bytes behind its end.
                        if eof { received_after_eof = true; continue; }
                        received += u64::from(*n);
                        ends.received(usize::from(*n));
                    }
                    Step::Eof => { eof = true; ends.eof(); }
                    Step::End(total) => { totals.push(*total); ends.handle_end(*total); }
                    Step::Abort => { aborted = true; ends.abort(Aborted::new(AbortCode::Reset, "")); }
                }
            }
            let clean = !aborted && eof && !totals.is_empty() && totals.iter().all(|total| *total == received);
            prop_assert_eq!(ends.verdict() == Verdict::Clean, clean, "{:?} {}", steps, received_after_eof);
        }
    }
}
