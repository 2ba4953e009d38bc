//! A virtual CPU: the KVM_RUN loop, and how another thread stops it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once};

use kvm_bindings::{kvm_mp_state, kvm_regs, kvm_run, KVM_EXIT_IO_IN, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::state::{CpuState, Tsc};
use super::{boot, cpuid, During, Error, Mode, Result, Sections, Vm};
use crate::memory::GuestMemory;

/// Sections of a vCPU's state besides KVM's structures.
const CPUID: &str = "cpuid";
const TSC_KHZ: &str = "tsc_khz";
/// One in this many, 250 ppm: what calibration may miss by.
const TSC_TOLERANCE: u32 = 4000;

/// Where the accesses go that nobody in the kernel answers. `size` is in bytes; values are little-endian numbers.
pub trait Bus {
    fn pio_read(&self, port: u16, size: usize) -> u64;
    fn pio_write(&self, port: u16, size: usize, value: u64);
    fn mmio_read(&self, address: u64, size: usize) -> u64;
    fn mmio_write(&self, address: u64, size: usize, value: u64);
}

/// Why `Vcpu::run` returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Somebody called `stop`.
    Asked,
    /// The guest executed HLT and there is no irqchip to wake it.
    Hlt,
    /// A triple fault, or a shutdown that the guest asked KVM for.
    Shutdown,
    /// A reset that the guest asked KVM for.
    Reset,
}

/// Exits to userspace by kind, since the vCPU was made.
#[derive(Default)]
pub struct Exits {
    pub pio_read: AtomicU64,
    pub pio_write: AtomicU64,
    pub mmio_read: AtomicU64,
    pub mmio_write: AtomicU64,
    pub serial: AtomicU64,
    pub other: AtomicU64,
}

pub struct Vcpu {
    index: u32,
    vm: Arc<Vm>,
    stop: StopRequest,
    fd: Mutex<VcpuFd>,
    /// What `reset` puts back; an error if this KVM cannot say it all.
    initial: Mutex<Option<Result<CpuState>>>,
    pub exits: Exits,
}

impl Vcpu {
    pub(super) fn new(vm: Arc<Vm>, index: u32, mut fd: VcpuFd) -> Vcpu {
        let stop = StopRequest::new(fd.get_kvm_run());
        Vcpu { index, vm, stop, fd: Mutex::new(fd), initial: Mutex::new(None), exits: Exits::default() }
    }

    /// The vCPU for as long as nobody runs it: waiting for that could take for ever.
    fn stopped(&self) -> Result<MutexGuard<'_, VcpuFd>> {
        self.fd.try_lock().map_err(|_| Error::Guest(format!("vcpu {} is running", self.index)))
    }

    fn memory(&self) -> Option<GuestMemory> {
        self.vm.memory()
    }

    pub fn set_cpuid(&self, cpus: u32) -> Result<()> {
        let cpuid = cpuid::for_vcpu(&self.vm, self.index, cpus)?;
        let fd = self.stopped()?;
        fd.set_cpuid2(&cpuid).during("KVM_SET_CPUID2")?;
        *self.initial.lock().unwrap() = Some(CpuState::of(&fd, &self.vm.kvm));
        Ok(())
    }

    /// Go back to the state of `set_cpuid`. Not while it runs.
    pub fn reset(&self) -> Result<()> {
        match &*self.initial.lock().unwrap() {
            Some(Ok(state)) => state.restore(&*self.stopped()?, Tsc::GoesOn).map(|_| ()),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::Guest("a vCPU can be reset after set_cpuid only".into())),
        }
    }

    /// All of its state, in a form for another process. Not while it runs.
    pub fn save(&self) -> Result<Sections> {
        let fd = self.stopped()?;
        let mut sections = CpuState::of(&fd, &self.vm.kvm)?.sections();
        sections.insert(CPUID.to_owned(), cpuid::features(&self.vm)?);
        // A KVM that cannot tell has no other than the host's.
        sections.insert(TSC_KHZ.to_owned(), fd.get_tsc_khz().unwrap_or(0).to_le_bytes().into());
        Ok(sections)
    }

    /// Go on from `save`, after `set_cpuid`; returns the MSRs that could not be given their value.
    pub fn restore(&self, sections: &Sections) -> Result<Vec<u32>> {
        if sections.get(CPUID) != Some(&cpuid::features(&self.vm)?) {
            return Err(Error::Guest("the CPU of this host has not the features of the one it was taken on".into()));
        }
        let state = CpuState::parse(sections)?;
        let fd = self.stopped()?;
        let khz =
            sections.get(TSC_KHZ).and_then(|bytes| bytes.as_slice().try_into().ok()).map_or(0, u32::from_le_bytes);
        set_tsc_khz(&fd, khz)?;
        state.restore(&fd, Tsc::Restored)
    }

    /// Tell the guest that it stood still for a while, so that it does not take that for a lockup of its own.
    pub fn kvmclock_ctrl(&self) {
        // Fails where the guest does not use kvmclock.
        let _ = self.stopped().map(|fd| fd.kvmclock_ctrl());
    }

    pub fn set_linux_entry(&self, entry: u64, boot_params: u64) -> Result<()> {
        let memory = self.memory().ok_or_else(|| Error::Guest("the VM has no memory".into()))?;
        boot::linux_entry(&*self.stopped()?, &memory, entry, boot_params)
    }

    /// What firmware sets up on the CPUs that Linux starts itself.
    pub fn set_linux_secondary(&self) -> Result<()> {
        boot::set_msrs(&*self.stopped()?)
    }

    /// Enter `mode` and set the named general registers; the others are 0 (rflags 2). Ends HLT and the wait for a SIPI.
    pub fn set_registers(&self, mode: Mode, registers: &BTreeMap<String, u64>) -> Result<()> {
        let fd = self.stopped()?;
        let mut regs = kvm_regs { rflags: 2, ..Default::default() };
        for (name, value) in registers {
            let (_, register) = named(&mut regs)
                .into_iter()
                .find(|(known, _)| known == name)
                .ok_or_else(|| Error::Guest(format!("no register {name}")))?;
            *register = *value;
        }
        boot::enter(&fd, self.memory().as_ref(), mode)?;
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        fd.set_mp_state(runnable).during("KVM_SET_MP_STATE")?;
        fd.set_regs(&regs).during("KVM_SET_REGS")
    }

    pub fn registers(&self) -> Result<BTreeMap<&'static str, u64>> {
        let fd = self.stopped()?;
        let mut regs = fd.get_regs().during("KVM_GET_REGS")?;
        let sregs = fd.get_sregs().during("KVM_GET_SREGS")?;
        let mut all: BTreeMap<_, _> = named(&mut regs).into_iter().map(|(name, value)| (name, *value)).collect();
        all.extend([
            ("cr0", sregs.cr0),
            ("cr2", sregs.cr2),
            ("cr3", sregs.cr3),
            ("cr4", sregs.cr4),
            ("efer", sregs.efer),
            ("cs", u64::from(sregs.cs.selector)),
            ("cs_base", sregs.cs.base),
        ]);
        Ok(all)
    }

    /// Make `run` return soon, or the next `run` at once. Any thread; also wakes a vCPU in HLT.
    pub fn stop(&self) {
        self.stop.ask();
    }

    /// Run the guest until something ends it; may be called again to go on. One thread at a time.
    pub fn run(&self, bus: &dyn Bus) -> Result<Stopped> {
        let mut fd = self.stopped()?;
        let _here = self.stop.running_here();
        loop {
            if let Some(stopped) = self.step(&mut fd, bus)? {
                return Ok(stopped);
            }
        }
    }

    fn step(&self, fd: &mut VcpuFd, bus: &dyn Bus) -> Result<Option<Stopped>> {
        match fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => self.port_access(fd.get_kvm_run(), bus),
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&self.exits.mmio_read);
                let value = bus.mmio_read(address, data.len()).to_le_bytes();
                data.copy_from_slice(&value[..data.len()]);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&self.exits.mmio_write);
                bus.mmio_write(address, data.len(), number(data));
            }
            Ok(VcpuExit::Hlt) => return Ok(Some(Stopped::Hlt)),
            Ok(VcpuExit::Shutdown) => return Ok(Some(Stopped::Shutdown)),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Ok(Some(Stopped::Reset)),
            Ok(VcpuExit::SystemEvent(..)) => return Ok(Some(Stopped::Shutdown)),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => count(&self.exits.other),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(self.gave_up(fd, &format!("KVM cannot enter the guest, hardware reason {reason:#x}")));
            }
            Ok(VcpuExit::InternalError) => {
                // SAFETY: KVM_EXIT_INTERNAL_ERROR says that this member of the union is filled.
                let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                return Err(self.gave_up(fd, &format!("KVM internal error, suberror {suberror}")));
            }
            Ok(exit) => {
                let reason = format!("unexpected exit {exit:?}");
                return Err(self.gave_up(fd, &reason));
            }
            // A signal, a stop request, or the SIPI that an AP waited for.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                count(&self.exits.other);
                return Ok(self.stop.take().then_some(Stopped::Asked));
            }
            Err(error) => return Err(error).during("KVM_RUN"),
        }
        Ok(None)
    }

    fn gave_up(&self, fd: &VcpuFd, reason: &str) -> Error {
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        Error::Guest(format!("vcpu {}: {reason}, rip {rip:#x}", self.index))
    }

    /// An IN or OUT, with a repeat count for string instructions.
    fn port_access(&self, run: &mut kvm_run, bus: &dyn Bus) {
        // SAFETY: KVM_EXIT_IO says that this member of the union is filled.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, repeats) = (usize::from(io.size), io.count as usize);
        let start = std::ptr::from_mut(run).cast::<u8>();
        // SAFETY: KVM keeps count * size bytes at data_offset in the mapping of kvm_run, and runs no guest now.
        let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), size * repeats) };
        let reading = u32::from(io.direction) == KVM_EXIT_IO_IN;
        let serial = self.vm.serial_at(io.port);
        count(match (&serial, reading) {
            (Some(_), _) => &self.exits.serial,
            (None, true) => &self.exits.pio_read,
            (None, false) => &self.exits.pio_write,
        });
        for element in data.chunks_exact_mut(size) {
            match (&serial, reading) {
                (Some((port, register)), true) => {
                    element.fill(0);
                    element[0] = port.read(*register);
                }
                (Some((port, register)), false) => port.write(*register, element[0]),
                (None, true) => element.copy_from_slice(&bus.pio_read(io.port, size).to_le_bytes()[..size]),
                (None, false) => bus.pio_write(io.port, size, number(element)),
            }
        }
    }
}

/// Have the guest's time stamp counter run as fast as it did, if this host's differs by more than a clock drifts.
fn set_tsc_khz(fd: &VcpuFd, khz: u32) -> Result<()> {
    let now = fd.get_tsc_khz().unwrap_or(0);
    if khz == 0 || now.abs_diff(khz) <= now / TSC_TOLERANCE {
        return Ok(());
    }
    fd.set_tsc_khz(khz).map_err(|_| {
        Error::Guest(format!("the time stamp counter runs at {now} kHz on this host, and ran at {khz} kHz"))
    })
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Up to 8 bytes as a little-endian number.
fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

fn named(regs: &mut kvm_regs) -> [(&'static str, &mut u64); 18] {
    [
        ("rax", &mut regs.rax),
        ("rbx", &mut regs.rbx),
        ("rcx", &mut regs.rcx),
        ("rdx", &mut regs.rdx),
        ("rsi", &mut regs.rsi),
        ("rdi", &mut regs.rdi),
        ("rsp", &mut regs.rsp),
        ("rbp", &mut regs.rbp),
        ("r8", &mut regs.r8),
        ("r9", &mut regs.r9),
        ("r10", &mut regs.r10),
        ("r11", &mut regs.r11),
        ("r12", &mut regs.r12),
        ("r13", &mut regs.r13),
        ("r14", &mut regs.r14),
        ("r15", &mut regs.r15),
        ("rip", &mut regs.rip),
        ("rflags", &mut regs.rflags),
    ]
}

/// A wish that KVM_RUN returns, which no race can lose.
///
/// `immediate_exit` stops a KVM_RUN that is about to begin, the signal one that is in the guest or in HLT. The
/// wish stands until `take` sees it.
struct StopRequest {
    wanted: AtomicBool,
    /// In the mapping of kvm_run, which lives as long as the VcpuFd beside this in `Vcpu`.
    immediate_exit: *mut u8,
    /// Who is in `run`; the lock keeps that thread there while it is sent a signal.
    thread: Mutex<Option<libc::pthread_t>>,
}

// SAFETY: the pointer is only used for atomic accesses, see `immediate_exit`.
unsafe impl Send for StopRequest {}
// SAFETY: as above.
unsafe impl Sync for StopRequest {}

impl StopRequest {
    fn new(run: &mut kvm_run) -> StopRequest {
        install_signal_handler();
        let immediate_exit = &raw mut run.immediate_exit;
        StopRequest { wanted: AtomicBool::new(false), immediate_exit, thread: Mutex::new(None) }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: one byte of a mapping that outlives us; the kernel only reads it.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    fn ask(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        self.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(thread) = *self.thread.lock().unwrap() {
            // SAFETY: the thread is in `run`, so it exists; the signal has a handler that does nothing.
            unsafe { libc::pthread_kill(thread, stop_signal()) };
        }
    }

    /// Clear immediate_exit first: a request that comes in between is then seen here or leaves it set.
    fn take(&self) -> bool {
        self.immediate_exit().store(0, Ordering::SeqCst);
        self.wanted.swap(false, Ordering::SeqCst)
    }

    fn running_here(&self) -> RunningHere<'_> {
        // SAFETY: pthread_self has no preconditions.
        *self.thread.lock().unwrap() = Some(unsafe { libc::pthread_self() });
        unblock_signal();
        RunningHere(self)
    }
}

struct RunningHere<'a>(&'a StopRequest);

impl Drop for RunningHere<'_> {
    fn drop(&mut self) {
        *self.0.thread.lock().unwrap() = None;
    }
}

fn stop_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

extern "C" fn do_nothing(_: i32) {}

/// Without SA_RESTART the signal does no more than end KVM_RUN with EINTR.
fn install_signal_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero sigaction is valid: no flags, no masked signals.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = do_nothing as *const () as usize;
        // SAFETY: a handler that does nothing is async-signal-safe.
        unsafe { libc::sigaction(stop_signal(), &action, std::ptr::null_mut()) };
    });
}

fn unblock_signal() {
    // SAFETY: an all-zero set is made empty before it is used.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is ours, and a thread may change its own mask.
    unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, stop_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
