//! Keeps this process alive when somebody truncates a file of guest memory: what is gone reads as zeroes from then on.
//!
//! An access to a page that its file has no more is a SIGBUS. The handler puts a private page of zeroes in its place, if
//! the address is guest memory, and leaves every other SIGBUS to whoever handled it before.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::OnceLock;

use libc::{c_int, c_void, sigaction, siginfo_t};

const SLOTS: usize = 4096;
/// Pages are replaced one by one; those of huge pages cannot be.
const PAGE: usize = 4096;

/// A watched mapping: where it starts and where it ends. `CLAIMED` is behind every address, while the end is written.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
}

const FREE: usize = 0;
const CLAIMED: usize = usize::MAX;
static WATCHED: [Slot; SLOTS] = [const { Slot { start: AtomicUsize::new(FREE), end: AtomicUsize::new(0) } }; SLOTS];
/// What handled the signal before us. Set before the handler is installed.
static BEFORE: OnceLock<sigaction> = OnceLock::new();

/// A mapping of guest memory whose pages may vanish; dropped before it is unmapped.
pub struct Watch(&'static Slot);

impl Watch {
    pub fn new(host: *const u8, size: usize) -> io::Result<Self> {
        install()?;
        let slot = WATCHED
            .iter()
            .find(|slot| slot.start.compare_exchange(FREE, CLAIMED, SeqCst, SeqCst).is_ok())
            .ok_or_else(|| io::Error::other(format!("more than {SLOTS} memory regions in this process")))?;
        slot.end.store(host as usize + size, SeqCst);
        slot.start.store(host as usize, SeqCst);
        Ok(Self(slot))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.end.store(0, SeqCst);
        self.0.start.store(FREE, SeqCst);
    }
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<c_int> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        BEFORE.get_or_init(|| {
            let mut before = MaybeUninit::<sigaction>::zeroed();
            // SAFETY: asks for the present action only, into memory of ours; all zeroes is a valid one.
            unsafe {
                libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr());
                before.assume_init()
            }
        });
        // SAFETY: all zeroes is a valid action.
        let mut action = unsafe { MaybeUninit::<sigaction>::zeroed().assume_init() };
        action.sa_sigaction = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler calls nothing but system calls, and reads nothing but atomics.
        unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) }
    });
    if *failed != 0 {
        return Err(io::Error::other("no handler for SIGBUS can be installed"));
    }
    Ok(())
}

extern "C" fn on_sigbus(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    if code == libc::BUS_ADRERR && is_watched(address) && replace(address & !(PAGE - 1)) {
        return;
    }
    // The access is repeated when we return, and ends with whoever is in charge.
    if let Some(before) = BEFORE.get() {
        // SAFETY: puts back what was installed before.
        unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    }
}

fn is_watched(address: usize) -> bool {
    WATCHED.iter().any(|slot| slot.start.load(SeqCst) <= address && address < slot.end.load(SeqCst))
}

fn replace(page: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page lies in guest memory, which the thread that was interrupted keeps mapped.
    let new = unsafe { libc::mmap(page as *mut c_void, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    new != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_about_to_be_used_watches_nothing() {
        let here = std::ptr::from_ref(&WATCHED) as usize;
        let slot = &WATCHED[SLOTS - 1];
        slot.start.store(CLAIMED, SeqCst);
        slot.end.store(usize::MAX, SeqCst);
        assert!(!is_watched(here));
        slot.end.store(0, SeqCst);
        slot.start.store(FREE, SeqCst);
    }
}
