//! Which CPU engine runs a guest here, and the line that says why.

use crate::arguments::Engine;
use crate::exit::with_code;
use engine_kvm::Verdict;

/// The engine that will run, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// `soft` or `kvm`.
    pub name: &'static str,
    /// One clause.
    pub why: String,
}

/// Decides. KVM is probed only when it may be taken.
pub fn choose(wanted: Engine) -> anyhow::Result<Choice> {
    match wanted {
        Engine::Soft => Ok(Choice { name: "soft", why: "asked for".into() }),
        Engine::Kvm => match engine_kvm::probe() {
            Verdict::Usable { .. } => Err(with_code(
                crate::exit::YADO_FAILED,
                "/dev/kvm works here, but yado's KVM engine arrives with a later version; use --engine soft",
            )),
            Verdict::Unusable { why, cure } => {
                let cure = cure.map(|cure| format!("; {cure}")).unwrap_or_default();
                Err(with_code(
                    crate::exit::YADO_FAILED,
                    format!(
                        "/dev/kvm {why}{cure}; and yado's KVM engine arrives with a later version: use --engine soft"
                    ),
                ))
            }
        },
        Engine::Auto => Ok(match engine_kvm::probe() {
            Verdict::Usable { .. } => Choice {
                name: "soft",
                why: "KVM works here, but yado's engine for it arrives with a later version".into(),
            },
            Verdict::Unusable { why, .. } => Choice { name: "soft", why: format!("/dev/kvm {why}") },
        }),
    }
}
