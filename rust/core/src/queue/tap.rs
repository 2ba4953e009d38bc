//! A tap between completed chains and the used ring, for faults on purpose. Without one it costs a comparison.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::ring::Used;
use super::VirtQueue;

/// A chain that its handler completed and that the driver has not got back.
#[derive(Debug, Clone, Copy)]
pub struct Completed {
    used: Used,
    run: u64,
}

impl Completed {
    pub fn head(&self) -> u16 {
        self.used.receipt.id
    }

    /// The used length that the driver is told.
    pub fn length(&self) -> u32 {
        self.used.length
    }

    /// The same chain with another used length.
    #[must_use]
    pub fn resized(self, length: u32) -> Self {
        Self { used: Used { length, whole: false, ..self.used }, ..self }
    }
}

/// Gets every chain that is completed, and gives back to the driver what it likes with `VirtQueue::give_back`.
pub trait Tap: Send + Sync {
    /// What was completed since the last call. Runs where it would have been published, without a lock.
    fn completed(&self, batch: Vec<Completed>);
}

/// The tap of a started queue, and what it has not seen yet.
pub(super) struct Tapped {
    tap: Arc<dyn Tap>,
    batch: Vec<Completed>,
}

impl Tapped {
    pub fn new(tap: Arc<dyn Tap>) -> Self {
        Self { tap, batch: Vec::new() }
    }

    pub fn put(&mut self, used: Used, run: u64) {
        self.batch.push(Completed { used, run });
    }
}

impl VirtQueue {
    /// From now on completed chains go to `tap`, or to the driver again. Holds for all later starts of the queue.
    pub fn set_tap(&self, tap: Option<Arc<dyn Tap>>) {
        let mut current = self.tap();
        current.clone_from(&tap);
        // Before a chain can be put into it.
        self.has_tap.fetch_or(tap.is_some(), Ordering::Relaxed);
        let before = match self.active().as_mut() {
            Some(active) => std::mem::replace(&mut active.tapped, tap.clone().map(Tapped::new)),
            None => None,
        };
        self.has_tap.store(tap.is_some(), Ordering::Relaxed);
        drop(current);
        if let Some(Tapped { batch, .. }) = before {
            self.give_back(&batch, None);
        }
    }

    pub(super) fn tap(&self) -> MutexGuard<'_, Option<Arc<dyn Tap>>> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hand over what was completed; false if there is no tap.
    pub(super) fn pass_to_tap(&self) -> bool {
        if !self.has_tap.load(Ordering::Relaxed) {
            return false;
        }
        let (tap, batch) = match self.active().as_mut().and_then(|active| active.tapped.as_mut()) {
            Some(Tapped { tap, batch }) => (tap.clone(), std::mem::take(batch)),
            None => return false,
        };
        if !batch.is_empty() {
            tap.completed(batch);
        }
        true
    }

    /// What was put on a thread that does not serve goes to the tap at once.
    pub(crate) fn pass_late(&self) {
        if !self.is_server() {
            self.pass_to_tap();
        }
    }

    /// Put chains into the used ring, in this order, and publish them with one interrupt decision, or with the one
    /// that is given. A chain may be given back twice, and none makes an interrupt for nothing. Any thread.
    ///
    /// Those of an earlier run of the queue are dropped.
    pub fn give_back(&self, chains: &[Completed], interrupt: Option<bool>) {
        let decision = {
            // A reset waits: nothing of the old driver lands in the new one's ring.
            let _unchanged = self.state.shared();
            let run = self.run();
            let mut active = self.active();
            let Some(active) = active.as_mut() else { return };
            for chain in chains.iter().filter(|chain| chain.run == run) {
                active.put(chain.used, self.state.is_broken());
            }
            active.publish()
        };
        self.decided(match interrupt {
            Some(true) => Some(true),
            Some(false) => decision.and(Some(false)),
            None => decision,
        });
    }
}
