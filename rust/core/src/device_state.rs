//! What the queues of one device share.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::interrupt::Interrupt;

/// The epoch of a device, whether it is broken, and its configuration interrupt.
pub struct DeviceState {
    name: String,
    /// Read-locked while a chain's memory is touched, so that a reset waits for a copy in progress. Never held
    /// while Python runs.
    copies: RwLock<()>,
    /// Counts the resets.
    epoch: AtomicU64,
    broken: AtomicBool,
    reason: Mutex<Option<String>>,
    driver_ok: AtomicBool,
    config_interrupt: Mutex<Option<Interrupt>>,
    on_broken: Box<dyn Fn(&str) + Send + Sync>,
}

impl DeviceState {
    /// `on_broken` is told the reason, on the thread that found it, before the driver is interrupted.
    pub fn new(name: String, on_broken: Box<dyn Fn(&str) + Send + Sync>) -> Self {
        Self {
            name,
            copies: RwLock::new(()),
            epoch: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            reason: Mutex::new(None),
            driver_ok: AtomicBool::new(false),
            config_interrupt: Mutex::new(None),
            on_broken,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(SeqCst)
    }

    /// Why the device needs a reset.
    pub fn broken(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Break the device; the first reason stands. No queue takes a further chain or publishes one.
    pub fn fail(&self, reason: &str) {
        {
            let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            if first.is_some() {
                return;
            }
            *first = Some(reason.to_owned());
            self.broken.store(true, SeqCst);
        }
        (self.on_broken)(reason);
        if self.driver_ok() {
            self.notify_config();
        }
    }

    pub fn driver_ok(&self) -> bool {
        self.driver_ok.load(SeqCst)
    }

    /// Whether the driver is up, so that it is told when the device breaks.
    pub fn set_driver_ok(&self, driver_ok: bool) {
        self.driver_ok.store(driver_ok, SeqCst);
    }

    pub fn set_config_interrupt(&self, interrupt: Option<Interrupt>) {
        *self.config_interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    pub fn notify_config(&self) {
        let interrupt = self.config_interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(interrupt) = interrupt {
            interrupt.signal();
        }
    }

    /// Start a new epoch: chains of the old one are stale, and the device is whole again. Stop the queues first: what
    /// their handlers are doing is not waited for here.
    pub fn reset(&self) {
        let _no_copy_runs = self.exclusive();
        self.epoch.fetch_add(1, SeqCst);
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.broken.store(false, SeqCst);
    }

    /// Waits until no chain's memory is being touched, and keeps it so.
    pub(crate) fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.copies.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch stays as it is, and so does the run of each queue.
    pub(crate) fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.copies.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }
}
