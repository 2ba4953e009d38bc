//! What a queue counts, always: relaxed, because nobody decides anything by it.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn take_back(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Since the queue was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Notifies that reached userspace.
    pub notifies: Counter,
    /// Signals found in the eventfd.
    pub kicks: Counter,
    /// Signals of our own among them, at least.
    pub own_kicks: Counter,
    /// Times the I/O thread found the eventfd signalled.
    pub wakeups: Counter,
    /// Times the I/O thread was told that the host had answered.
    pub answers: Counter,
    /// Chains taken.
    pub chains: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    /// Published batches the driver wanted no interrupt for.
    pub suppressed: Counter,
}

impl Counters {
    /// Kicks that can only be the driver's, as far as they were found.
    pub fn driver_kicks(&self) -> u64 {
        (self.kicks.get() + self.notifies.get()).saturating_sub(self.own_kicks.get())
    }

    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("notifies", self.notifies.get()),
            ("kicks", self.kicks.get()),
            ("wakeups", self.wakeups.get()),
            ("answers", self.answers.get()),
            ("chains", self.chains.get()),
            ("interrupts", self.interrupts.get()),
            ("suppressed", self.suppressed.get()),
        ]
    }
}
