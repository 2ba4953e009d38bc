//! The reset line: what CPUs and interrupt controllers were when they were made, kept to be put back.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, Msrs, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{During, Result};

/// They go on through a reset, so that they stay equal on all CPUs.
const TIME_STAMP_COUNTER: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;

pub(super) struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
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
            regs: fd.get_regs().during("KVM_GET_REGS")?,
            sregs: fd.get_sregs().during("KVM_GET_SREGS")?,
            fpu: fd.get_fpu().during("KVM_GET_FPU")?,
            xcrs: fd.get_xcrs().during("KVM_GET_XCRS")?,
            debug: fd.get_debug_regs().during("KVM_GET_DEBUGREGS")?,
            lapic: fd.get_lapic().during("KVM_GET_LAPIC")?,
            events: fd.get_vcpu_events().during("KVM_GET_VCPU_EVENTS")?,
            mp_state: fd.get_mp_state().during("KVM_GET_MP_STATE")?,
            msrs: read_msrs(fd, kvm)?,
        })
    }

    /// The special registers come before what depends on them: the mode of the local APIC, paging, the MSRs.
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<()> {
        fd.set_sregs(&self.sregs).during("KVM_SET_SREGS")?;
        fd.set_regs(&self.regs).during("KVM_SET_REGS")?;
        fd.set_fpu(&self.fpu).during("KVM_SET_FPU")?;
        fd.set_xcrs(&self.xcrs).during("KVM_SET_XCRS")?;
        fd.set_debug_regs(&self.debug).during("KVM_SET_DEBUGREGS")?;
        for entry in &self.msrs {
            // Some can be read and not written; those the guest cannot have changed.
            let _ = fd.set_msrs(&one(*entry));
        }
        fd.set_lapic(&self.lapic).during("KVM_SET_LAPIC")?;
        fd.set_vcpu_events(&self.events).during("KVM_SET_VCPU_EVENTS")?;
        fd.set_mp_state(self.mp_state).during("KVM_SET_MP_STATE")
    }
}

/// Every MSR that this KVM lists and lets us read.
fn read_msrs(fd: &VcpuFd, kvm: &Kvm) -> Result<Vec<kvm_msr_entry>> {
    let known = kvm.get_msr_index_list().during("KVM_GET_MSR_INDEX_LIST")?;
    let ours = known.as_slice().iter().filter(|index| !matches!(**index, TIME_STAMP_COUNTER | TSC_ADJUST));
    Ok(ours.filter_map(|index| read_msr(fd, *index)).collect())
}

fn read_msr(fd: &VcpuFd, index: u32) -> Option<kvm_msr_entry> {
    let mut msrs = one(kvm_msr_entry { index, ..Default::default() });
    let read = fd.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice()[0])
}

fn one(entry: kvm_msr_entry) -> Msrs {
    Msrs::from_entries(&[entry]).expect("one entry fits")
}

/// The PICs, the I/O APIC and the PIT.
pub(super) struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl ChipState {
    pub(super) fn of(fd: &VmFd) -> Result<ChipState> {
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut irqchip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut irqchip).during("KVM_GET_IRQCHIP")?;
            irqchips.push(irqchip);
        }
        Ok(ChipState { irqchips, pit: fd.get_pit2().during("KVM_GET_PIT2")? })
    }

    pub(super) fn restore(&self, fd: &VmFd) -> Result<()> {
        for irqchip in &self.irqchips {
            fd.set_irqchip(irqchip).during("KVM_SET_IRQCHIP")?;
        }
        fd.set_pit2(&self.pit).during("KVM_SET_PIT2")
    }
}
