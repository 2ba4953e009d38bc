//! The state of CPUs and interrupt controllers: to be put back at a reset, or to go on with in another process.

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, Msrs, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{During, Error, Result};

const TIME_STAMP_COUNTER: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const TSC_DEADLINE: u32 = 0x6e0;

/// KVM's structures by name, byte for byte: what a snapshot holds.
pub type Sections = BTreeMap<String, Vec<u8>>;

/// What becomes of a CPU's time stamp counter.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tsc {
    /// It goes on, as through a reset, so that it stays equal on all CPUs.
    GoesOn,
    /// It is what it was when the state was taken.
    Restored,
}

pub(super) struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Area,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl CpuState {
    pub(super) fn of(fd: &VcpuFd, kvm: &Kvm) -> Result<CpuState> {
        Ok(CpuState {
            // First: it settles the events that change what the others say.
            mp_state: fd.get_mp_state().during("KVM_GET_MP_STATE")?,
            regs: fd.get_regs().during("KVM_GET_REGS")?,
            sregs: fd.get_sregs().during("KVM_GET_SREGS")?,
            xsave: Area(fd.get_xsave().during("KVM_GET_XSAVE")?.region),
            xcrs: fd.get_xcrs().during("KVM_GET_XCRS")?,
            debug: fd.get_debug_regs().during("KVM_GET_DEBUGREGS")?,
            // Before the local APIC: a deadline that passes in between is then in both, not in neither.
            msrs: read_msrs(fd, kvm)?,
            lapic: fd.get_lapic().during("KVM_GET_LAPIC")?,
            events: fd.get_vcpu_events().during("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// The special registers come before what depends on them: the mode of the local APIC, paging, the MSRs.
    ///
    /// Returns the MSRs that this KVM did not take and that have another value now.
    pub(super) fn restore(&self, fd: &VcpuFd, tsc: Tsc) -> Result<Vec<u32>> {
        fd.set_sregs(&self.sregs).during("KVM_SET_SREGS")?;
        fd.set_regs(&self.regs).during("KVM_SET_REGS")?;
        let xsave = kvm_xsave { region: self.xsave.0, ..Default::default() };
        // SAFETY: KVM reads more than these 4096 bytes only of a guest with features that have to be asked for by
        // arch_prctl, which nobody here does.
        unsafe { fd.set_xsave(&xsave) }.during("KVM_SET_XSAVE")?;
        fd.set_xcrs(&self.xcrs).during("KVM_SET_XCRS")?;
        fd.set_debug_regs(&self.debug).during("KVM_SET_DEBUGREGS")?;
        // The deadline of its timer is one of the MSRs, and lost unless the timer is in that mode.
        fd.set_lapic(&self.lapic).during("KVM_SET_LAPIC")?;
        let refused = self.restore_msrs(fd, tsc);
        fd.set_vcpu_events(&self.events).during("KVM_SET_VCPU_EVENTS")?;
        fd.set_mp_state(self.mp_state).during("KVM_SET_MP_STATE")?;
        Ok(refused)
    }

    fn restore_msrs(&self, fd: &VcpuFd, tsc: Tsc) -> Vec<u32> {
        let mut msrs = self.msrs.clone();
        // The deadline is compared with the counter as soon as it is set.
        msrs.sort_by_key(|entry| match entry.index {
            TIME_STAMP_COUNTER => 0,
            TSC_DEADLINE => 2,
            _ => 1,
        });
        let goes_on = |index| tsc == Tsc::GoesOn && matches!(index, TIME_STAMP_COUNTER | TSC_ADJUST);
        let wanted = msrs.into_iter().filter(|entry| !goes_on(entry.index));
        wanted.filter(|entry| !set_msr(fd, *entry)).map(|entry| entry.index).collect()
    }

    pub(super) fn sections(&self) -> Sections {
        [
            ("regs", bytes_of(&self.regs)),
            ("sregs", bytes_of(&self.sregs)),
            ("xsave", bytes_of(&self.xsave)),
            ("xcrs", bytes_of(&self.xcrs)),
            ("debugregs", bytes_of(&self.debug)),
            ("lapic", bytes_of(&self.lapic)),
            ("vcpu_events", bytes_of(&self.events)),
            ("mp_state", bytes_of(&self.mp_state)),
            ("msrs", self.msrs.iter().flat_map(bytes_of).collect()),
        ]
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .into()
    }

    pub(super) fn parse(sections: &Sections) -> Result<CpuState> {
        Ok(CpuState {
            regs: parse(sections, "regs")?,
            sregs: parse(sections, "sregs")?,
            xsave: parse(sections, "xsave")?,
            xcrs: parse(sections, "xcrs")?,
            debug: parse(sections, "debugregs")?,
            lapic: parse(sections, "lapic")?,
            events: parse(sections, "vcpu_events")?,
            mp_state: parse(sections, "mp_state")?,
            msrs: parse_all(sections, "msrs")?,
        })
    }
}

/// Every MSR that this KVM lists and lets us read.
fn read_msrs(fd: &VcpuFd, kvm: &Kvm) -> Result<Vec<kvm_msr_entry>> {
    let known = kvm.get_msr_index_list().during("KVM_GET_MSR_INDEX_LIST")?;
    Ok(known.as_slice().iter().filter_map(|index| read_msr(fd, *index)).collect())
}

fn read_msr(fd: &VcpuFd, index: u32) -> Option<kvm_msr_entry> {
    let mut msrs = one(kvm_msr_entry { index, ..Default::default() });
    let read = fd.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice()[0])
}

/// Whether the MSR has the value now. Some can be read and not written; those the guest cannot have changed.
fn set_msr(fd: &VcpuFd, entry: kvm_msr_entry) -> bool {
    fd.set_msrs(&one(entry)).is_ok_and(|set| set == 1)
        || read_msr(fd, entry.index).is_some_and(|now| now.data == entry.data)
}

fn one(entry: kvm_msr_entry) -> Msrs {
    Msrs::from_entries(&[entry]).expect("one entry fits")
}

/// The PICs, the I/O APIC and the PIT.
pub(super) struct ChipState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

const IRQCHIPS: [(u32, &str); 3] =
    [(KVM_IRQCHIP_PIC_MASTER, "pic0"), (KVM_IRQCHIP_PIC_SLAVE, "pic1"), (KVM_IRQCHIP_IOAPIC, "ioapic")];

impl ChipState {
    pub(super) fn of(fd: &VmFd) -> Result<ChipState> {
        let mut irqchips = IRQCHIPS.map(|(chip_id, _)| kvm_irqchip { chip_id, ..Default::default() });
        for irqchip in &mut irqchips {
            fd.get_irqchip(irqchip).during("KVM_GET_IRQCHIP")?;
        }
        Ok(ChipState { irqchips, pit: fd.get_pit2().during("KVM_GET_PIT2")? })
    }

    pub(super) fn restore(&self, fd: &VmFd) -> Result<()> {
        for irqchip in &self.irqchips {
            fd.set_irqchip(irqchip).during("KVM_SET_IRQCHIP")?;
        }
        fd.set_pit2(&self.pit).during("KVM_SET_PIT2")
    }

    pub(super) fn sections(&self) -> Sections {
        let irqchips = IRQCHIPS.iter().zip(&self.irqchips);
        let mut sections: Sections =
            irqchips.map(|((_, name), irqchip)| ((*name).to_owned(), bytes_of(irqchip))).collect();
        sections.insert("pit".to_owned(), bytes_of(&self.pit));
        sections
    }

    pub(super) fn parse(sections: &Sections) -> Result<ChipState> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for ((chip_id, name), irqchip) in IRQCHIPS.into_iter().zip(&mut irqchips) {
            *irqchip = parse(sections, name)?;
            irqchip.chip_id = chip_id;
        }
        Ok(ChipState { irqchips, pit: parse(sections, "pit")? })
    }
}

/// The clock that KVM gives a guest (kvmclock), in ns.
pub(super) fn clock(fd: &VmFd) -> Result<u64> {
    Ok(fd.get_clock().during("KVM_GET_CLOCK")?.clock)
}

pub(super) fn set_clock(fd: &VmFd, clock: u64) -> Result<()> {
    fd.set_clock(&kvm_clock_data { clock, ..Default::default() }).during("KVM_SET_CLOCK")
}

/// The registers that XSAVE saves, as long as the guest has no feature that has to be asked for.
#[derive(Clone, Copy)]
struct Area([u32; 1024]);

/// A structure of the kernel that is copied to and from bytes.
///
/// # Safety
/// Its padding is spelt out as fields, and every pattern of bits is a valid value.
unsafe trait Plain: Copy {}

// SAFETY: integers and arrays of them, without gaps; KVM defines its structures so.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for Area {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: as above; its union has a member that is an array of all its bytes.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}

fn bytes_of<T: Plain>(value: &T) -> Vec<u8> {
    // SAFETY: a Plain value is bytes without gaps, all of them initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }.to_vec()
}

fn section<'a>(sections: &'a Sections, name: &str) -> Result<&'a [u8]> {
    sections.get(name).map(Vec::as_slice).ok_or_else(|| Error::Guest(format!("the state has no {name}")))
}

fn parse<T: Plain>(sections: &Sections, name: &str) -> Result<T> {
    let values = parse_all(sections, name)?;
    match values[..] {
        [value] => Ok(value),
        _ => Err(Error::Guest(format!("the state has {} times {name}", values.len()))),
    }
}

fn parse_all<T: Plain>(sections: &Sections, name: &str) -> Result<Vec<T>> {
    let values = section(sections, name)?.chunks_exact(size_of::<T>());
    if !values.remainder().is_empty() {
        return Err(Error::Guest(format!("the state has {} bytes too many in {name}", values.remainder().len())));
    }
    // SAFETY: as many bytes as a T has, and any bytes are a Plain value.
    Ok(values.map(|bytes| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections(bytes: usize) -> Sections {
        [("regs".to_owned(), vec![1; bytes])].into()
    }

    #[test]
    fn a_structure_survives_its_bytes() {
        let regs = kvm_regs { rip: 0x1234_5678_9abc_def0, rflags: 2, ..Default::default() };
        assert_eq!(parse::<kvm_regs>(&[("regs".to_owned(), bytes_of(&regs))].into(), "regs").unwrap(), regs);
    }

    #[test]
    fn a_section_that_is_missing_or_of_another_length_is_an_error() {
        let size = size_of::<kvm_regs>();
        let reason = |sections: &Sections| parse::<kvm_regs>(sections, "regs").unwrap_err().to_string();
        assert_eq!(reason(&Sections::new()), "the state has no regs");
        assert_eq!(reason(&sections(0)), "the state has 0 times regs");
        assert_eq!(reason(&sections(2 * size)), "the state has 2 times regs");
        assert_eq!(reason(&sections(size + 3)), "the state has 3 bytes too many in regs");
    }
}
