//! When the answers to a batch of requests are published: the driver goes on with them while the next are served.

use std::time::{Duration, Instant};

/// So many requests are published first: the driver takes its time to wake up, while the next ones are served.
const FIRST: u32 = 16;
/// So many requests are published together from then on, which the driver goes on with.
const PUBLISHED: u32 = 64;
/// A request that took longer does not wait for the rest of its batch.
const SLOW: Duration = Duration::from_millis(1);
/// After requests that took less, the next ones are taken to be quick too: twice as many, up to a limit.
const QUICK: Duration = Duration::from_micros(5);
const MAX_STRIDE: u32 = 16;

/// When to publish within a batch. While requests are quick the clock is read for some of them only.
pub struct Pace {
    since: Instant,
    /// Requests to be answered before the clock is read again, and those that were since.
    stride: u32,
    answered: u32,
    unpublished: u32,
    /// How many are published together next.
    together: u32,
}

impl Pace {
    pub fn new() -> Self {
        Self { since: Instant::now(), stride: 1, answered: 0, unpublished: 0, together: FIRST }
    }

    /// Some requests were answered; true if the driver should know by now.
    pub fn answered(&mut self, requests: u32) -> bool {
        self.unpublished += requests;
        self.answered += requests;
        // Before anything else: it renews `stride`.
        let slow = self.answered >= self.stride && self.is_slow();
        let due = slow || self.unpublished >= self.together;
        if due {
            self.unpublished = 0;
            self.together = PUBLISHED;
        }
        due
    }

    fn is_slow(&mut self) -> bool {
        let now = Instant::now();
        let each = (now - self.since) / self.answered;
        self.since = now;
        self.stride = if each < QUICK { (2 * self.stride).min(MAX_STRIDE) } else { 1 };
        self.answered = 0;
        each > SLOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_request_is_published_wherever_it_comes_in_a_batch() {
        for before in 0..200 {
            let mut pace = Pace::new();
            for _ in 0..before {
                pace.since = Instant::now() - 2 * QUICK;
                pace.answered(1);
            }
            pace.since = Instant::now() - 2 * SLOW;
            assert!(pace.answered(1), "after {before} others");
        }
    }
}
