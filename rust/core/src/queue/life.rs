//! The life of a queue: its ring is taken into use, held, moved to other memory and given up again.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::ring::Ring;
use super::service::Active;
use super::tap::Tapped;
use super::{Handler, RingConfig, VirtQueue};
use crate::memory::GuestMemory;
use crate::GuestError;

impl VirtQueue {
    /// Take a ring into use. Nothing is served yet: attach, or call `service`.
    pub fn start(&self, memory: GuestMemory, config: &RingConfig, handler: Arc<dyn Handler>) -> Result<(), GuestError> {
        let named = |error| GuestError(format!("{}: {error}", self.name));
        self.check_size(config).map_err(named)?;
        let ring = Ring::new(memory, config).map_err(named)?;
        // In the order of `set_tap`.
        let tap = self.tap();
        let mut active = self.active();
        if active.is_some() {
            return Err(named(GuestError("the queue is started already".into())));
        }
        self.set_handler_name(handler.name());
        *active = Some(Active::new(ring, config.in_order, handler, tap.clone().map(Tapped::new)));
        Ok(())
    }

    fn check_size(&self, &RingConfig { size, packed, .. }: &RingConfig) -> Result<(), GuestError> {
        let (most, kind) = (self.max_size, if packed { "1 or more" } else { "a power of two" });
        if size == 0 || size > most || (!packed && !size.is_power_of_two()) {
            return Err(GuestError(format!("{size} entries ({kind} up to {most})")));
        }
        Ok(())
    }

    /// Wait for a running handler, forget the ring and return its position: the next avail and used indexes.
    ///
    /// Called by the handler itself it does not wait, and the service ends when the handler returns.
    pub fn stop(&self) -> (u16, u16) {
        let _alone = (!self.is_server()).then(|| self.doorbell.entry.wait_and_enter());
        self.finish();
        let active = {
            let _no_copy_runs = self.state.exclusive();
            self.run.fetch_add(1, Ordering::Relaxed);
            self.active().take()
        };
        active.map_or((0, 0), |active| active.ring.position())
    }

    /// Wait for a running handler; no chain is taken until `release`. What is out may be completed.
    ///
    /// Called by the handler itself it does not wait, as `stop`.
    pub fn hold(&self) {
        self.doorbell.entry.hold(self.is_server());
        self.finish();
    }

    /// Wait for what the handler has asked the host for.
    pub(super) fn finish(&self) {
        let handler = self.active().as_ref().map(|active| active.handler.clone());
        if let (Some(handler), false) = (handler, self.is_server()) {
            handler.finish();
        }
    }

    /// End a `hold`. Look at the ring afterwards: attach, or call `service`.
    pub fn release(&self) {
        self.doorbell.entry.release();
    }

    /// Go on in other guest memory, with the ring at the same addresses; a chain that is out keeps the old one.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), GuestError> {
        let named = |error| GuestError(format!("{}: {error}", self.name));
        match self.active().as_mut() {
            Some(active) => active.ring.set_memory(memory.clone()).map_err(named),
            None => Ok(()),
        }
    }

    /// Serve by another handler from the next pass on; what the old one has taken is its to complete.
    pub fn set_handler(&self, handler: Arc<dyn Handler>) {
        self.set_handler_name(handler.name());
        let old = self.active().as_mut().map(|active| std::mem::replace(&mut active.handler, handler));
        if let (Some(old), false) = (old, self.is_server()) {
            old.finish();
        }
    }

    /// What messages call who serves it, or served it last.
    pub fn handler_name(&self) -> String {
        self.handler_name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_handler_name(&self, name: &str) {
        *self.handler_name.lock().unwrap_or_else(PoisonError::into_inner) = name.to_owned();
    }
}
