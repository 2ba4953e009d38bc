//! KVM: the virtual machine, its CPUs and the one device that is answered without Python, the serial port.

mod boot;
mod cpuid;
mod serial;
mod state;
mod vcpu;
mod vm;

use std::ffi::CStr;
use std::fmt;

use kvm_ioctls::{Cap, Kvm};

pub use boot::Mode;
pub use serial::Serial;
pub use state::Sections;
pub use vcpu::{Bus, Exits, Stopped, Vcpu};
pub use vm::{IoAddress, MsiRoute, Space, Vm};

/// What KVM refused, or what the guest did that KVM cannot run.
#[derive(Clone, Debug)]
pub enum Error {
    /// A system call failed.
    Call { call: &'static str, errno: i32 },
    /// KVM gave up on the guest; one line with the reason and the instruction pointer.
    Guest(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Call { call, errno } => write!(f, "{call}: {}", strerror(*errno)),
            Error::Guest(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}

/// The text of an errno.
pub fn strerror(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

pub type Result<T> = std::result::Result<T, Error>;

/// Names the call that an errno belongs to: `fd.create_irq_chip().during("KVM_CREATE_IRQCHIP")?`.
trait During<T> {
    fn during(self, call: &'static str) -> Result<T>;
}

impl<T> During<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn during(self, call: &'static str) -> Result<T> {
        self.map_err(|error| Error::Call { call, errno: error.errno() })
    }
}

impl<T> During<T> for std::io::Result<T> {
    fn during(self, call: &'static str) -> Result<T> {
        self.map_err(|error| Error::Call { call, errno: error.raw_os_error().unwrap_or(libc::EIO) })
    }
}

const NEEDED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

const KVM_API_VERSION: i32 = 12;

/// None if the KVM behind `device` offers what is needed here, else what is missing.
pub fn supported(device: &CStr) -> Option<String> {
    let kvm = match Kvm::new_with_path(device) {
        Ok(kvm) => kvm,
        Err(error) => return Some(strerror(error.errno())),
    };
    let version = kvm.get_api_version();
    if version < 0 {
        return Some("not a KVM device".into());
    }
    if version != KVM_API_VERSION {
        return Some(format!("KVM API version is {version}, not {KVM_API_VERSION}"));
    }
    let missing: Vec<_> = NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    (!missing.is_empty()).then(|| format!("KVM lacks {}", missing.join(", ")))
}
