//! What became of frames, from what was seen of them.

use std::collections::BTreeMap;
use std::ops::Range;

/// What became of the frames since the last verdict.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Sent and not received; of a stream that is not ours, the numbers that are missing in it.
    pub lost: u64,
    /// Received after one of their stream that was sent later, or twice.
    pub reordered: u64,
    pub damaged: u64,
    /// Received, and none of those that were sent since the last verdict.
    pub foreign: u64,
}

/// What was received since the last verdict.
#[derive(Default)]
pub struct Seen {
    streams: BTreeMap<u16, Stream>,
    verdict: Verdict,
}

impl Seen {
    /// A frame came whole.
    pub fn saw(&mut self, stream: u16, sequence: u64) {
        let stream = self.streams.entry(stream).or_default();
        self.verdict.reordered += u64::from(sequence < stream.next);
        stream.add(&Stream { first: sequence, next: sequence.saturating_add(1), received: 1 });
    }

    pub fn damaged(&mut self) {
        self.verdict.damaged += 1;
    }

    pub fn foreign(&mut self) {
        self.verdict.foreign += 1;
    }

    /// How many frames came of the first `count` streams, the damaged ones among them.
    pub fn of_streams(&self, count: usize) -> u64 {
        let whole = self.streams.iter().filter(|(number, _)| usize::from(**number) < count);
        self.verdict.damaged + whole.map(|(_, stream)| stream.received).sum::<u64>()
    }

    /// These were sent.
    pub fn expect(&mut self, stream: u16, sent: Range<u64>) {
        let sent = Stream { first: sent.start, next: sent.end, received: 0 };
        self.streams.entry(stream).or_default().add(&sent);
    }

    /// What was seen elsewhere.
    pub fn add(&mut self, other: Self) {
        for (number, stream) in other.streams {
            self.streams.entry(number).or_default().add(&stream);
        }
        self.verdict.reordered += other.verdict.reordered;
        self.verdict.damaged += other.verdict.damaged;
        self.verdict.foreign += other.verdict.foreign;
    }

    pub fn verdict(&self) -> Verdict {
        Verdict { lost: self.streams.values().map(Stream::lost).sum(), ..self.verdict }
    }
}

/// The frames that have one source.
#[derive(Clone, Copy)]
struct Stream {
    /// Sequence numbers: the lowest, and the one after the highest.
    first: u64,
    next: u64,
    received: u64,
}

impl Default for Stream {
    fn default() -> Self {
        Self { first: u64::MAX, next: 0, received: 0 }
    }
}

impl Stream {
    fn add(&mut self, other: &Self) {
        self.first = self.first.min(other.first);
        self.next = self.next.max(other.next);
        self.received += other.received;
    }

    fn lost(&self) -> u64 {
        self.next.saturating_sub(self.first).saturating_sub(self.received)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(frames: &[(u16, u64)]) -> Seen {
        let mut seen = Seen::default();
        frames.iter().for_each(|(stream, sequence)| seen.saw(*stream, *sequence));
        seen
    }

    #[test]
    fn each_stream_has_an_order_of_its_own() {
        let found = seen(&[(0, 7), (1, 3), (0, 8), (1, 4)]).verdict();
        assert_eq!(found, Verdict::default());
    }

    #[test]
    fn a_late_frame_is_not_lost_and_one_that_comes_twice_is_late() {
        assert_eq!(seen(&[(0, 1), (0, 3), (0, 2)]).verdict(), Verdict { reordered: 1, ..Verdict::default() });
        assert_eq!(seen(&[(0, 1), (0, 2), (0, 2)]).verdict(), Verdict { reordered: 1, ..Verdict::default() });
    }

    #[test]
    fn numbers_that_are_missing_are_lost_wherever_they_should_have_come() {
        let mut all = seen(&[(0, 1), (0, 4)]);
        all.add(seen(&[(0, 3)]));
        assert_eq!(all.verdict().lost, 1);
        all.expect(0, 0..9);
        all.expect(5, 100..110);
        assert_eq!(all.verdict().lost, 6 + 10);
    }

    #[test]
    fn numbers_at_the_end_of_all_numbers_do_no_harm() {
        assert_eq!(
            seen(&[(0, u64::MAX), (0, 0)]).verdict(),
            Verdict { lost: u64::MAX - 2, reordered: 1, ..Verdict::default() }
        );
    }
}
